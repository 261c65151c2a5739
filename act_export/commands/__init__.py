"""The command line: a thin file a command, which parses, calls the job, and prints."""
