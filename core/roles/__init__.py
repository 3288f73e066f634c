"""One module a party; each does only what that party may do with what it holds."""
