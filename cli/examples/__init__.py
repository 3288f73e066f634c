"""Examples: programs that use dtl as anyone does, through its commands and its files."""
