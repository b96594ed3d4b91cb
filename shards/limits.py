"""Numbers of the format that a command line checks words by. Imports nothing."""

AREA = (0.67, 1.0)  # least and most share of a source that the published crop shows
BANK_CELL = 8  # px of a crop's side that one count covers; counts are 0 to 64
LARGEST = 8192  # px of a frame's side; a record that says more asks for gigabytes
