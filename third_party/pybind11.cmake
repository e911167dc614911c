# pybind11 >= 2.13, BSD-3-Clause (https://github.com/pybind/pybind11). Installed by pip as a build requirement of
# pyproject.toml; for a plain CMake build, `pip install pybind11` and pass -DPython_EXECUTABLE. No source is copied.
set(PYBIND11_FINDPYTHON ON)
if(NOT pybind11_DIR)
    find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module)
    execute_process(COMMAND "${Python_EXECUTABLE}" -m pybind11 --cmakedir
                    OUTPUT_VARIABLE pybind11_DIR OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()
find_package(pybind11 2.13 CONFIG REQUIRED)
