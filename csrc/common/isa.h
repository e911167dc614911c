// Instruction sets: what this core was compiled with, what the machine has, what is used.
#pragma once

#include <string>
#include <vector>

namespace meditok {

enum class Isa : int { kScalar = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Vnni = 3, kNeon = 4 };

const char* isa_name(Isa isa);
std::vector<std::string> isa_compiled();
std::vector<std::string> isa_detected();

// Chooses a level by name for all later calls; "" chooses the best one that is compiled and present. Returns
// the name chosen. Throws std::invalid_argument naming the level and the levels at hand if it is not among
// them.
std::string choose_isa(const std::string& name);

Isa current_isa();

// Whether level avx512vnni may compute on AMX tiles of bfloat16: compiled in, present, and granted by the system.
bool has_tiles();

}  // namespace meditok
