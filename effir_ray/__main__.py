"""``python -m effir_ray``: the command line where no console script is installed, as in a cluster job."""

from effir_ray.cli import main

main()
