//! Protobuf's wire format, one level deep: a message as the sequence of its fields' raw bytes. This is what makes a rewrite lossless: what is not changed is copied as it stands, never re-encoded.
//! Source: the "Encoding" page of the Protocol Buffers documentation.

use bytes::Bytes;

use super::Rope;

/// One field of a message: its number and its bytes as they stand in the file.
#[derive(Debug, Clone)]
pub struct Record {
    pub field: u32,
    /// Key, length (if any) and body.
    pub raw: Bytes,
    /// The body of a length-delimited field, the value's bytes of any other.
    pub body: Bytes,
}

/// Splits a message into its fields, in file order. Fails on anything that protobuf does not allow.
pub fn records(message: &Bytes) -> std::result::Result<Vec<Record>, String> {
    let mut out = Vec::new();
    let mut at = 0;
    while at < message.len() {
        let start = at;
        let key = varint(message, &mut at)?;
        let field = u32::try_from(key >> 3).ok().filter(|f| *f > 0).ok_or("a field number out of range")?;
        let body_start;
        match key & 7 {
            0 => {
                body_start = at;
                varint(message, &mut at)?;
            }
            1 | 5 => {
                body_start = at;
                at += if key & 7 == 1 { 8 } else { 4 };
            }
            2 => {
                let len = usize::try_from(varint(message, &mut at)?).map_err(|_| "a field length out of range")?;
                body_start = at;
                at = at.checked_add(len).ok_or("a field length out of range")?;
            }
            other => return Err(format!("wire type {other} at byte {start}, which ONNX files do not use")),
        }
        if at > message.len() {
            return Err(format!("field {field} at byte {start} runs past the end"));
        }
        out.push(Record { field, raw: message.slice(start..at), body: message.slice(body_start..at) });
    }
    Ok(out)
}

fn varint(bytes: &[u8], at: &mut usize) -> std::result::Result<u64, String> {
    let mut value = 0u64;
    for shift in (0..70).step_by(7) {
        let byte = *bytes.get(*at).ok_or("a number runs past the end")?;
        *at += 1;
        if shift == 63 && byte > 1 {
            break;
        }
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err("a number of more than 64 bits".into())
}

/// Key and length of a length-delimited field.
pub fn header(field: u32, len: usize) -> Bytes {
    let mut out = Vec::with_capacity(12);
    for mut value in [u64::from(field) << 3 | 2, len as u64] {
        while value >= 0x80 {
            out.push(value as u8 | 0x80);
            value >>= 7;
        }
        out.push(value as u8);
    }
    out.into()
}

/// A length-delimited field with `message` as its body.
pub fn field(number: u32, message: &impl prost::Message) -> Rope {
    let mut rope = Rope::default();
    let body = message.encode_to_vec();
    rope.push(header(number, body.len()));
    rope.push(body);
    rope
}

/// The message with the `nth` occurrence of string field `number` replaced; every other byte as it was.
pub fn with_string(message: &Bytes, number: u32, nth: usize, value: &str) -> std::result::Result<Bytes, String> {
    let mut out = Vec::with_capacity(message.len() + value.len());
    let mut seen = 0;
    for record in records(message)? {
        if record.field == number {
            if seen == nth {
                out.extend_from_slice(&header(number, value.len()));
                out.extend_from_slice(value.as_bytes());
                seen += 1;
                continue;
            }
            seen += 1;
        }
        out.extend_from_slice(&record.raw);
    }
    if seen <= nth { Err(format!("there is no occurrence {nth} of field {number}")) } else { Ok(out.into()) }
}
