// Chooses the product that was compiled for a tile's width and a format. Include it after the
// template `product_of<FOUR, W>`, inside the namespace of the instruction set.

using Product = void (*)(const Matrix&, int, const Tile&, float*, size_t);

template <bool FOUR, int... I>
Product product_for(int width, std::integer_sequence<int, I...>) {
  static const Product table[] = {product_of<FOUR, I + 1>...};
  return table[width - 1];
}

void product(const Matrix& m, int panel, const Tile& tile, float* out, size_t stride) {
  auto widths = std::make_integer_sequence<int, kTile>();
  auto run = m.format == kInt4 ? product_for<true>(tile.width, widths)
                               : product_for<false>(tile.width, widths);
  run(m, panel, tile, out, stride);
}
