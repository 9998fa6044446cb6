"""What a step of a plan takes, and where it waits."""
