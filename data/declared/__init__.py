"""What raster files say of themselves, and the comparison with what is asked of them."""
