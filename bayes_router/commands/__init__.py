"""One file a command: `HELP`, `parser(arguments)` and `run(options)`; `bayes_router.cli` collects them."""
