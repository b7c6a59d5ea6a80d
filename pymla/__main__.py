from pymla.cli import main

main()
