"""Read the files of data sets, whatever their form, as records and samples."""
