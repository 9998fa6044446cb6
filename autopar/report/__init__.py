"""Plans for people: show, explain, diff, validate, compare."""
