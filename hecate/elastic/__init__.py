"""Changes of the ranks of a job: ranks that are lost or join, backups of experts, and experts that move to other owners."""
