"""Benchmarks: of every mechanism against length (`lengths`), of prompts (`prompts`), and of a GPU (`device`)."""
