//! The part of protobuf's encoding that TensorBoard's messages need.

/// A message that is being written. Fields are written in the order of the calls.
#[derive(Debug, Clone, Default)]
pub(super) struct Message(Vec<u8>);

const VARINT: u64 = 0;
const FIXED64: u64 = 1;
const BYTES: u64 = 2;
const FIXED32: u64 = 5;

impl Message {
    pub(super) fn new() -> Self {
        Self::default()
    }

    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.0
    }

    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn key(&mut self, field: u64, wire: u64) {
        self.varint(field << 3 | wire);
    }

    pub(super) fn uint(mut self, field: u64, value: u64) -> Self {
        self.key(field, VARINT);
        self.varint(value);
        self
    }

    pub(super) fn double(mut self, field: u64, value: f64) -> Self {
        self.key(field, FIXED64);
        self.0.extend(value.to_le_bytes());
        self
    }

    pub(super) fn float(mut self, field: u64, value: f32) -> Self {
        self.key(field, FIXED32);
        self.0.extend(value.to_le_bytes());
        self
    }

    pub(super) fn bytes(mut self, field: u64, value: &[u8]) -> Self {
        self.key(field, BYTES);
        self.varint(value.len() as u64);
        self.0.extend(value);
        self
    }

    pub(super) fn string(self, field: u64, value: &str) -> Self {
        self.bytes(field, value.as_bytes())
    }

    pub(super) fn message(self, field: u64, value: Self) -> Self {
        self.bytes(field, &value.0)
    }

    /// Writes repeated doubles, packed.
    pub(super) fn doubles(self, field: u64, values: &[f64]) -> Self {
        let packed: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.bytes(field, &packed)
    }
}

#[cfg(test)]
pub(super) mod reader {
    //! The other direction, for tests.

    #[derive(Debug, Clone, PartialEq)]
    pub(crate) enum Field<'b> {
        Uint(u64),
        Double(f64),
        Float(f32),
        Bytes(&'b [u8]),
    }

    fn varint(bytes: &mut &[u8]) -> u64 {
        let mut value = 0;
        for shift in (0..).step_by(7) {
            let (byte, rest) = bytes.split_first().unwrap();
            *bytes = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                break;
            }
        }
        value
    }

    /// Reads all fields of a message, with their numbers.
    pub(crate) fn fields(mut bytes: &[u8]) -> Vec<(u64, Field<'_>)> {
        let mut fields = vec![];
        while !bytes.is_empty() {
            let key = varint(&mut bytes);
            let field = match key & 7 {
                super::VARINT => Field::Uint(varint(&mut bytes)),
                super::FIXED64 => {
                    let (value, rest) = bytes.split_first_chunk().unwrap();
                    bytes = rest;
                    Field::Double(f64::from_le_bytes(*value))
                }
                super::FIXED32 => {
                    let (value, rest) = bytes.split_first_chunk().unwrap();
                    bytes = rest;
                    Field::Float(f32::from_le_bytes(*value))
                }
                super::BYTES => {
                    let length = varint(&mut bytes) as usize;
                    let (value, rest) = bytes.split_at(length);
                    bytes = rest;
                    Field::Bytes(value)
                }
                wire => panic!("wire type {wire}"),
            };
            fields.push((key >> 3, field));
        }
        fields
    }

    /// Reads the fields of a message within a message.
    pub(crate) fn inner<'b>(fields: &[(u64, Field<'b>)], number: u64) -> Vec<(u64, Field<'b>)> {
        match fields.iter().find(|(n, _)| *n == number) {
            Some((_, Field::Bytes(bytes))) => self::fields(bytes),
            other => panic!("field {number} is {other:?}"),
        }
    }
}
