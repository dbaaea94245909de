"""The networks: teachers as they are loaded and asked, students as they are built."""
