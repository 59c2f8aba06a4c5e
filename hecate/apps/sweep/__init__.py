"""Many runs of one configuration with other values: `hecate sweep`. See docs/use/sweeps.md.

`sweep_file` reads and expands the file, `names` names the runs, `checks` refuses what is wrong before the first run, and
`results` and `table` compare the runs. `hecate.launch.many_runs` trains them and remembers what has become of each.
"""
