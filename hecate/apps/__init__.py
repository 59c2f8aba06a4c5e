"""What is built on the trainer: each folder is an app that nothing outside it and the command line imports."""
