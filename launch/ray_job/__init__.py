"""A job on a Ray cluster: the controller, its workers, the messages between them, and what a person sees of the job."""
