"""Each defence of SECURITY.md, removed in a copy: the tests named beside it must fail then."""
