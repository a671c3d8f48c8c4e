//! An encoder for PNG without compression: pictures in logs are small, so a deflate encoder of our own is not worth it.

/// Polynomial of PNG's CRC, which differs from the CRC of event files.
const POLYNOMIAL: u32 = 0xedb8_8320;
/// Largest number of bytes in an uncompressed deflate block.
const BLOCK: usize = 65535;

const CRCS: [u32; 256] = {
    let mut table = [0; 256];
    let mut i = 0;
    while i < 256 {
        let (mut crc, mut bit) = (i as u32, 0);
        while bit < 8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ POLYNOMIAL } else { crc >> 1 };
            bit += 1;
        }
        table[i] = crc;
        i += 1;
    }
    table
};

fn crc(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| CRCS[(crc as u8 ^ byte) as usize] ^ crc >> 8)
}

fn adler(bytes: &[u8]) -> u32 {
    let (mut a, mut b) = (1u32, 0u32);
    for byte in bytes {
        a = (a + u32::from(*byte)) % 65521;
        b = (b + a) % 65521;
    }
    b << 16 | a
}

fn chunk(png: &mut Vec<u8>, kind: &[u8; 4], data: &[u8]) {
    png.extend((data.len() as u32).to_be_bytes());
    let begin = png.len();
    png.extend(kind);
    png.extend(data);
    png.extend(crc(&png[begin..]).to_be_bytes());
}

/// Encodes pixels of 8 bits a channel, row by row, with 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 channels (RGBA).
pub(super) fn encode(width: u32, height: u32, channels: u8, pixels: &[u8]) -> Vec<u8> {
    let colour = [0, 4, 2, 6][usize::from(channels.clamp(1, 4)) - 1];
    let mut header = [width.to_be_bytes(), height.to_be_bytes()].concat();
    header.extend([8, colour, 0, 0, 0]);

    // Each row begins with the number of its filter; 0 means none.
    let row = width as usize * usize::from(channels);
    let rows: Vec<u8> = pixels.chunks(row.max(1)).flat_map(|row| [&[0], row].concat()).collect();
    let mut data = vec![0x78, 0x01];
    let blocks = rows.chunks(BLOCK);
    let last = blocks.len().saturating_sub(1);
    for (index, block) in blocks.enumerate() {
        data.push(u8::from(index == last));
        data.extend((block.len() as u16).to_le_bytes());
        data.extend((!(block.len() as u16)).to_le_bytes());
        data.extend(block);
    }
    data.extend(adler(&rows).to_be_bytes());

    let mut png = b"\x89PNG\r\n\x1a\n".to_vec();
    chunk(&mut png, b"IHDR", &header);
    chunk(&mut png, b"IDAT", &data);
    chunk(&mut png, b"IEND", &[]);
    png
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sums_are_those_of_the_standards() {
        assert_eq!(crc(b"123456789"), 0xcbf4_3926);
        assert_eq!(adler(b"Wikipedia"), 0x11e6_0398);
    }
}
