"""`hecate profile`: measure the devices and links of a job and write them down as a topology."""
