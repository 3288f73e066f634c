"""Every file that dtl reads or writes, strictly; knows nothing of roles."""
