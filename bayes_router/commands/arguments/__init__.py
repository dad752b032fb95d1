"""What each command takes, a file a command, without what it needs to run."""
