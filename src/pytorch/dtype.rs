use std::fmt;

use tch::Kind;

/// The type of a tensor's elements, by PyTorch's names.
///
/// ```
/// use tch::Kind;
/// use tch_ignite::pytorch::DType;
/// assert_eq!(DType::BFloat16.to_string(), "torch.bfloat16");
/// assert_eq!(DType::Int32.kind(), Some(Kind::Int));
/// assert_eq!(DType::UInt16.kind(), None); // tch has no such kind
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[expect(missing_docs, reason = "the names are PyTorch's")]
pub enum DType {
    Float64,
    Float32,
    Float16,
    BFloat16,
    Float8E4M3Fn,
    Float8E4M3FnUz,
    Float8E5M2,
    Float8E5M2FnUz,
    Float8E8M0FnU,
    Complex128,
    Complex64,
    Complex32,
    Int64,
    Int32,
    Int16,
    Int8,
    UInt64,
    UInt32,
    UInt16,
    UInt8,
    Bool,
    QInt8,
    QUInt8,
    QInt32,
}

/// One row of the table: PyTorch's name, bytes of an element, tch's kind, the class of PyTorch's storages.
type Row = (DType, &'static str, u64, Option<Kind>, Option<&'static str>);

const ROWS: [Row; 24] = [
    (DType::Float64, "torch.float64", 8, Some(Kind::Double), Some("DoubleStorage")),
    (DType::Float32, "torch.float32", 4, Some(Kind::Float), Some("FloatStorage")),
    (DType::Float16, "torch.float16", 2, Some(Kind::Half), Some("HalfStorage")),
    (DType::BFloat16, "torch.bfloat16", 2, Some(Kind::BFloat16), Some("BFloat16Storage")),
    (DType::Float8E4M3Fn, "torch.float8_e4m3fn", 1, Some(Kind::Float8e4m3fn), None),
    (DType::Float8E4M3FnUz, "torch.float8_e4m3fnuz", 1, Some(Kind::Float8e4m3fnuz), None),
    (DType::Float8E5M2, "torch.float8_e5m2", 1, Some(Kind::Float8e5m2), None),
    (DType::Float8E5M2FnUz, "torch.float8_e5m2fnuz", 1, Some(Kind::Float8e5m2fnuz), None),
    (DType::Float8E8M0FnU, "torch.float8_e8m0fnu", 1, None, None),
    (
        DType::Complex128,
        "torch.complex128",
        16,
        Some(Kind::ComplexDouble),
        Some("ComplexDoubleStorage"),
    ),
    (DType::Complex64, "torch.complex64", 8, Some(Kind::ComplexFloat), Some("ComplexFloatStorage")),
    (DType::Complex32, "torch.complex32", 4, Some(Kind::ComplexHalf), None),
    (DType::Int64, "torch.int64", 8, Some(Kind::Int64), Some("LongStorage")),
    (DType::Int32, "torch.int32", 4, Some(Kind::Int), Some("IntStorage")),
    (DType::Int16, "torch.int16", 2, Some(Kind::Int16), Some("ShortStorage")),
    (DType::Int8, "torch.int8", 1, Some(Kind::Int8), Some("CharStorage")),
    (DType::UInt64, "torch.uint64", 8, None, None),
    (DType::UInt32, "torch.uint32", 4, None, None),
    (DType::UInt16, "torch.uint16", 2, None, None),
    (DType::UInt8, "torch.uint8", 1, Some(Kind::Uint8), Some("ByteStorage")),
    (DType::Bool, "torch.bool", 1, Some(Kind::Bool), Some("BoolStorage")),
    (DType::QInt8, "torch.qint8", 1, Some(Kind::QInt8), Some("QInt8Storage")),
    (DType::QUInt8, "torch.quint8", 1, Some(Kind::QUInt8), Some("QUInt8Storage")),
    (DType::QInt32, "torch.qint32", 4, Some(Kind::QInt32), Some("QInt32Storage")),
];

impl DType {
    fn row(self) -> &'static Row {
        // The table lists the variants in the order of the enum, which a test checks.
        &ROWS[self as usize]
    }

    /// PyTorch's name, such as `torch.float32`.
    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// Bytes of one element.
    pub fn size(self) -> u64 {
        self.row().2
    }

    /// tch's kind; `None` where tch has none.
    pub fn kind(self) -> Option<Kind> {
        self.row().3
    }

    /// The class of storages in files, such as `FloatStorage`; `None` for the types that PyTorch writes as
    /// untyped storages.
    pub(super) fn storage_class(self) -> Option<&'static str> {
        self.row().4
    }

    /// The type whose kind in tch is `kind`; `None` where this table has none.
    pub fn from_kind(kind: Kind) -> Option<Self> {
        ROWS.iter().find(|row| row.3 == Some(kind)).map(|row| row.0)
    }

    pub(crate) fn named(name: &str) -> Option<Self> {
        ROWS.iter().find(|row| row.1 == name).map(|row| row.0)
    }

    pub(super) fn of_storage_class(class: &str) -> Option<Self> {
        ROWS.iter().find(|row| row.4 == Some(class)).map(|row| row.0)
    }

    pub(super) fn is_complex(self) -> bool {
        matches!(self, Self::Complex32 | Self::Complex64 | Self::Complex128)
    }

    pub(super) fn is_quantized(self) -> bool {
        matches!(self, Self::QInt8 | Self::QUInt8 | Self::QInt32)
    }

    /// Whether such tensors can have gradients.
    pub(super) fn is_differentiable(self) -> bool {
        self.is_complex()
            || matches!(self, Self::Float64 | Self::Float32 | Self::Float16 | Self::BFloat16)
    }

    /// How many bytes are one number, whose order depends on the machine that wrote it.
    pub(super) fn number_size(self) -> usize {
        (if self.is_complex() { self.size() / 2 } else { self.size() }) as usize
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_the_order_of_the_variants() {
        for (index, row) in ROWS.iter().enumerate() {
            assert_eq!(row.0 as usize, index, "{:?}", row.0);
            if let Some(kind) = row.3 {
                assert_eq!(kind.elt_size_in_bytes() as u64, row.2, "{:?}", row.0);
            }
        }
    }
}
