"""The file format of engine packages: manifest, files, publishing and verified reading."""
