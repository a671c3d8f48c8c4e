//! JSON values that keep every float: NaN and the infinities, which JSON does not have, become
//! `{"$f64": "NaN"}`, `"Infinity"`, `"-Infinity"`, or the bits in hexadecimal for any other NaN.

use serde::de::value::SeqDeserializer;
use serde::de::{
    self, DeserializeSeed, Deserializer, EnumAccess, IntoDeserializer, MapAccess, VariantAccess,
    Visitor,
};
use serde::ser::{self, Serialize, Serializer};
use serde::{Deserialize, forward_to_deserialize_any};
use serde_json::{Error, Map, Value};

const FLOAT: &str = "$f64";
const NAMED: [(&str, f64); 3] =
    [("NaN", f64::NAN), ("Infinity", f64::INFINITY), ("-Infinity", f64::NEG_INFINITY)];

/// As JSON.
pub(crate) fn to_value(value: &(impl Serialize + ?Sized)) -> Result<Value, Error> {
    value.serialize(Exact)
}

/// Back from [`to_value`].
pub(crate) fn from_value<'de, T: Deserialize<'de>>(value: &'de Value) -> Result<T, Error> {
    T::deserialize(Read(value))
}

fn float(number: f64) -> Value {
    if number.is_finite() {
        return number.into();
    }
    let name = NAMED.iter().find(|(_, named)| named.to_bits() == number.to_bits());
    let text =
        name.map_or_else(|| format!("{:016x}", number.to_bits()), |(name, _)| (*name).to_owned());
    Value::Object(Map::from_iter([(FLOAT.to_owned(), text.into())]))
}

/// The float that an object stands for, if it does.
fn float_of(object: &Map<String, Value>) -> Option<f64> {
    let text = object.get(FLOAT).filter(|_| object.len() == 1)?.as_str()?;
    match NAMED.iter().find(|(name, _)| *name == text) {
        Some((_, number)) => Some(*number),
        None => u64::from_str_radix(text, 16).ok().map(f64::from_bits),
    }
}

struct Exact;

macro_rules! plain {
    ($($method:ident $type:ty),*) => {$(
        fn $method(self, value: $type) -> Result<Value, Error> {
            serde_json::value::Serializer.$method(value)
        }
    )*};
}

impl Serializer for Exact {
    type Ok = Value;
    type Error = Error;
    type SerializeSeq = List;
    type SerializeTuple = List;
    type SerializeTupleStruct = List;
    type SerializeTupleVariant = List;
    type SerializeMap = Object;
    type SerializeStruct = Object;
    type SerializeStructVariant = Object;

    plain!(
        serialize_bool bool, serialize_i8 i8, serialize_i16 i16, serialize_i32 i32, serialize_i64 i64,
        serialize_i128 i128, serialize_u8 u8, serialize_u16 u16, serialize_u32 u32, serialize_u64 u64,
        serialize_u128 u128, serialize_char char, serialize_str &str, serialize_bytes &[u8],
        serialize_unit_struct &'static str
    );

    fn serialize_f32(self, value: f32) -> Result<Value, Error> {
        Ok(float(value.into()))
    }

    fn serialize_f64(self, value: f64) -> Result<Value, Error> {
        Ok(float(value))
    }

    fn serialize_none(self) -> Result<Value, Error> {
        Ok(Value::Null)
    }

    fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Result<Value, Error> {
        value.serialize(self)
    }

    fn serialize_unit(self) -> Result<Value, Error> {
        Ok(Value::Null)
    }

    fn serialize_unit_variant(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
    ) -> Result<Value, Error> {
        Ok(variant.into())
    }

    fn serialize_newtype_struct<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        value: &T,
    ) -> Result<Value, Error> {
        value.serialize(self)
    }

    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
        value: &T,
    ) -> Result<Value, Error> {
        Ok(tagged(Some(variant), value.serialize(self)?))
    }

    fn serialize_seq(self, _: Option<usize>) -> Result<List, Error> {
        Ok(List::default())
    }

    fn serialize_tuple(self, _: usize) -> Result<List, Error> {
        Ok(List::default())
    }

    fn serialize_tuple_struct(self, _: &'static str, _: usize) -> Result<List, Error> {
        Ok(List::default())
    }

    fn serialize_tuple_variant(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
        _: usize,
    ) -> Result<List, Error> {
        Ok(List { variant: Some(variant), ..List::default() })
    }

    fn serialize_map(self, _: Option<usize>) -> Result<Object, Error> {
        Ok(Object::default())
    }

    fn serialize_struct(self, _: &'static str, _: usize) -> Result<Object, Error> {
        Ok(Object::default())
    }

    fn serialize_struct_variant(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
        _: usize,
    ) -> Result<Object, Error> {
        Ok(Object { variant: Some(variant), ..Object::default() })
    }
}

/// A variant of an enum is an object with its name as the only key.
fn tagged(variant: Option<&'static str>, value: Value) -> Value {
    match variant {
        Some(variant) => Value::Object(Map::from_iter([(variant.to_owned(), value)])),
        None => value,
    }
}

#[derive(Default)]
struct List {
    variant: Option<&'static str>,
    values: Vec<Value>,
}

#[derive(Default)]
struct Object {
    variant: Option<&'static str>,
    key: String,
    values: Map<String, Value>,
}

macro_rules! lists {
    ($($trait:ident $method:ident),*) => {$(
        impl ser::$trait for List {
            type Ok = Value;
            type Error = Error;

            fn $method<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Error> {
                self.values.push(to_value(value)?);
                Ok(())
            }

            fn end(self) -> Result<Value, Error> {
                Ok(tagged(self.variant, Value::Array(self.values)))
            }
        }
    )*};
}
lists!(
    SerializeSeq serialize_element,
    SerializeTuple serialize_element,
    SerializeTupleStruct serialize_field,
    SerializeTupleVariant serialize_field
);

macro_rules! structs {
    ($($trait:ident),*) => {$(
        impl ser::$trait for Object {
            type Ok = Value;
            type Error = Error;

            fn serialize_field<T: Serialize + ?Sized>(
                &mut self,
                key: &'static str,
                value: &T,
            ) -> Result<(), Error> {
                self.values.insert(key.to_owned(), to_value(value)?);
                Ok(())
            }

            fn end(self) -> Result<Value, Error> {
                Ok(tagged(self.variant, Value::Object(self.values)))
            }
        }
    )*};
}
structs!(SerializeStruct, SerializeStructVariant);

impl ser::SerializeMap for Object {
    type Ok = Value;
    type Error = Error;

    fn serialize_key<T: Serialize + ?Sized>(&mut self, key: &T) -> Result<(), Error> {
        self.key = match to_value(key)? {
            Value::String(text) => text,
            key @ (Value::Number(_) | Value::Bool(_)) => key.to_string(),
            _ => return Err(ser::Error::custom("the keys of a map must be texts or numbers")),
        };
        Ok(())
    }

    fn serialize_value<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Error> {
        self.values.insert(std::mem::take(&mut self.key), to_value(value)?);
        Ok(())
    }

    fn end(self) -> Result<Value, Error> {
        Ok(Value::Object(self.values))
    }
}

#[derive(Clone, Copy)]
struct Read<'de>(&'de Value);

impl<'de> IntoDeserializer<'de, Error> for Read<'de> {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

impl<'de> Deserializer<'de> for Read<'de> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.0 {
            Value::Array(values) => {
                let mut list = SeqDeserializer::new(values.iter().map(Read));
                let value = visitor.visit_seq(&mut list)?;
                list.end()?;
                Ok(value)
            }
            Value::Object(values) => match float_of(values) {
                Some(number) => visitor.visit_f64(number),
                None => visitor.visit_map(Entries { left: values.iter(), value: None }),
            },
            plain => plain.deserialize_any(visitor),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.0 {
            Value::Null => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let of = match self.0 {
            Value::String(variant) => Some((variant, None)),
            Value::Object(values) if values.len() == 1 => {
                values.iter().next().map(|(variant, value)| (variant, Some(value)))
            }
            _ => None,
        };
        let (variant, value) =
            of.ok_or_else(|| de::Error::custom("a variant is a text, or an object of one entry"))?;
        visitor.visit_enum(Variant { variant, value })
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit
        unit_struct seq tuple tuple_struct map struct identifier ignored_any
    }
}

struct Entries<'de> {
    left: serde_json::map::Iter<'de>,
    value: Option<&'de Value>,
}

impl<'de> MapAccess<'de> for Entries<'de> {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Error> {
        let Some((key, value)) = self.left.next() else { return Ok(None) };
        self.value = Some(value);
        seed.deserialize(Key(key)).map(Some)
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, Error> {
        let value = self.value.take().ok_or_else(|| de::Error::custom("a value without a key"))?;
        seed.deserialize(Read(value))
    }
}

/// A key is a text also where it was a number.
struct Key<'de>(&'de str);

macro_rules! keys {
    ($($method:ident $visit:ident $type:ty),*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
            match self.0.parse::<$type>() {
                Ok(key) => visitor.$visit(key),
                Err(_) => visitor.visit_borrowed_str(self.0),
            }
        }
    )*};
}

impl<'de> Deserializer<'de> for Key<'de> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_borrowed_str(self.0)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_some(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_enum(self.0.into_deserializer())
    }

    keys!(
        deserialize_bool visit_bool bool,
        deserialize_i8 visit_i64 i64, deserialize_i16 visit_i64 i64, deserialize_i32 visit_i64 i64,
        deserialize_i64 visit_i64 i64, deserialize_i128 visit_i128 i128,
        deserialize_u8 visit_u64 u64, deserialize_u16 visit_u64 u64, deserialize_u32 visit_u64 u64,
        deserialize_u64 visit_u64 u64, deserialize_u128 visit_u128 u128
    );

    forward_to_deserialize_any! {
        f32 f64 char str string bytes byte_buf unit unit_struct seq tuple tuple_struct map struct
        identifier ignored_any
    }
}

struct Variant<'de> {
    variant: &'de str,
    value: Option<&'de Value>,
}

impl<'de> EnumAccess<'de> for Variant<'de> {
    type Error = Error;
    type Variant = Content<'de>;

    fn variant_seed<S: DeserializeSeed<'de>>(
        self,
        seed: S,
    ) -> Result<(S::Value, Content<'de>), Error> {
        Ok((seed.deserialize(Key(self.variant))?, Content(self.value)))
    }
}

struct Content<'de>(Option<&'de Value>);

impl<'de> Content<'de> {
    fn get(self) -> Result<Read<'de>, Error> {
        self.0.map(Read).ok_or_else(|| de::Error::custom("the variant has no content"))
    }
}

impl<'de> VariantAccess<'de> for Content<'de> {
    type Error = Error;

    fn unit_variant(self) -> Result<(), Error> {
        match self.0 {
            None => Ok(()),
            Some(value) => from_value(value),
        }
    }

    fn newtype_variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<S::Value, Error> {
        seed.deserialize(self.get()?)
    }

    fn tuple_variant<V: Visitor<'de>>(self, _: usize, visitor: V) -> Result<V::Value, Error> {
        self.get()?.deserialize_any(visitor)
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.get()?.deserialize_any(visitor)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashMap};

    use serde::Serialize;
    use serde::de::DeserializeOwned;
    use serde_json::json;

    use super::*;

    fn through<T: Serialize + DeserializeOwned>(value: &T) -> T {
        let text = to_value(value).unwrap().to_string();
        from_value(&serde_json::from_str(&text).unwrap()).unwrap()
    }

    #[test]
    fn every_float_comes_back_bit_for_bit() {
        let odd = [0x7ff0_0000_0000_0001, 0xfff8_0000_0000_0000, 0x7ff8_0000_0000_beef];
        let plain = [0., -0., 0.1, 5e-324, f64::MAX, f64::NAN, f64::INFINITY, f64::NEG_INFINITY];
        for number in plain.into_iter().chain(odd.map(f64::from_bits)) {
            assert_eq!(through(&number).to_bits(), number.to_bits());
            let option = through(&Some(number)).unwrap();
            assert_eq!(option.to_bits(), number.to_bits());
        }
        for number in [f32::NAN, f32::INFINITY, 1e-45, f32::from_bits(0x7fc0_0123)] {
            assert_eq!(through(&number).to_bits(), number.to_bits());
        }
        assert_eq!(to_value(&f64::NAN).unwrap(), json!({"$f64": "NaN"}));
        assert_eq!(through(&None::<f64>), None);
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    enum Kind {
        Unit,
        New(f64),
        Tuple(f64, u8),
        Struct { x: f64, y: Option<String> },
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Wrapped(Vec<f64>);

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Rest {
        scale: f64,
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(tag = "type")]
    enum Tagged {
        A { value: f64 },
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct All {
        kinds: Vec<Kind>,
        wrapped: Wrapped,
        by_number: BTreeMap<u64, (f64, bool)>,
        by_sign: BTreeMap<i8, ()>,
        by_text: HashMap<String, Option<f64>>,
        tagged: Tagged,
        letter: char,
        numbers: (i64, u64, u8, f32),
        #[serde(flatten)]
        rest: Rest,
    }

    #[test]
    fn all_shapes_come_back() {
        let inf = f64::INFINITY;
        let all = All {
            kinds: vec![
                Kind::Unit,
                Kind::New(inf),
                Kind::Tuple(-inf, 3),
                Kind::Struct { x: inf, y: Some("NaN".into()) },
            ],
            wrapped: Wrapped(vec![1., inf]),
            by_number: BTreeMap::from([(7, (inf, true)), (u64::MAX, (0.5, false))]),
            by_sign: BTreeMap::from([(-3, ())]),
            by_text: HashMap::from([("a".into(), Some(inf)), ("b".into(), None)]),
            tagged: Tagged::A { value: -inf },
            letter: 'ä',
            numbers: (i64::MIN, u64::MAX, 255, 0.1),
            rest: Rest { scale: inf },
        };
        assert_eq!(through(&all), all);
        // Where nothing is special, it is what everybody writes.
        let plain = json!({"a": [1, 2.5, null, "x"], "b": {"c": true}});
        assert_eq!(to_value(&plain).unwrap(), plain);
        assert_eq!(through(&plain), plain);
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        assert!(from_value::<f64>(&json!("NaN")).is_err());
        assert!(from_value::<f64>(&json!({"$f64": "what"})).is_err());
        assert!(from_value::<f64>(&json!({"$f64": "NaN", "more": 1})).is_err());
        assert!(from_value::<(f64, f64)>(&json!([1., 2., 3.])).is_err());
        assert!(from_value::<Kind>(&json!({"New": 1., "Unit": null})).is_err());
        assert!(from_value::<Kind>(&json!("New")).is_err());
        assert!(from_value::<u8>(&json!(256)).is_err());
        assert!(to_value(&BTreeMap::from([(vec![1], 2)])).is_err());
    }
}
