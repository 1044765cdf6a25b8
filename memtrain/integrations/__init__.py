"""memtrain inside other people's training loops; each module imports its library itself."""
