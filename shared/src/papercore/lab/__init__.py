"""What the command lines of the packages share; needs the extra ``papercore[lab]``. Import its modules by name."""
