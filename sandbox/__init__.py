"""Train one transformer under every parallelism, and prove that the gradients stay the same."""
