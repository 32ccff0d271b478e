"""What a program costs on TPUs that are not there: the real compiler, without the devices."""
