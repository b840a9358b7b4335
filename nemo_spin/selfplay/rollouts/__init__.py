"""The rollouts of an iteration on disk: Parquet files of finished ones, and journals of responses as they come."""
