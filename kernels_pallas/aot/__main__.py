"""python -m kernels_pallas.aot"""

from kernels_pallas.aot.table import main

main()
