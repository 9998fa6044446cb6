"""What a rank holds, and how it is saved."""
