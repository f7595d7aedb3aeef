"""The commands of `effopt`, one a file. Each reads its arguments, calls the library and prints."""
