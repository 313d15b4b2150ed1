"""The gptoss-lite command, one file per subcommand."""
