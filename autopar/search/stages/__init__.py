"""Plans with a pipeline: which stages on which ranks."""
