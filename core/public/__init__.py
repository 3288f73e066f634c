"""What anyone can check or compute from public files alone; knows no secrets."""
