"""Token files: ids with everything needed to decode and place them (Parquet, format 1)."""

from .datasets import TokenDataset, TokenStream
from .schema import FORMAT, Description, TokenInfo
from .tokens import Tokens

__all__ = ["FORMAT", "Description", "TokenDataset", "TokenInfo", "TokenStream", "Tokens"]
