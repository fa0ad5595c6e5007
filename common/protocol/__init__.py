"""The wire contract between a coordinator and its sites."""
