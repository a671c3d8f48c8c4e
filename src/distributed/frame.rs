//! The messages of the control group. Ranks send frames of one fixed size, so that sizes never differ in gloo, and each
//! frame says what the sender is doing, so that a difference is found before anything is done.

/// The size of a frame in bytes.
pub(super) const SIZE: usize = 512;
/// The size of the header: hash of the operation (8 bytes), length of the message (8), length of the operation's text
/// (2).
const HEADER: usize = 18;
/// The number of bytes for the operation's text, which is cut off there. The hash covers the whole text.
const TEXT: usize = 128;
/// The number of bytes of a message that fit into a frame; longer messages follow in a second exchange.
pub(super) const ROOM: usize = SIZE - HEADER - TEXT;

/// A frame as it was received.
#[derive(Debug, PartialEq)]
pub(super) struct Frame<'f> {
    hash: u64,
    /// The text of the sender's operation, cut off after `TEXT` bytes.
    pub(super) op: String,
    /// The length of the sender's message in bytes.
    pub(super) length: usize,
    /// The message; empty if it is too long for a frame.
    pub(super) inline: &'f [u8],
}

/// The FNV-1a hash of a text.
fn hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// A frame for this operation, with the message if there is room for it.
pub(super) fn write(op: &str, message: &[u8]) -> Vec<u8> {
    let mut text = op.len().min(TEXT);
    while !op.is_char_boundary(text) {
        text -= 1;
    }
    let mut frame = Vec::with_capacity(SIZE);
    frame.extend(hash(op).to_le_bytes());
    frame.extend((message.len() as u64).to_le_bytes());
    frame.extend((text as u16).to_le_bytes());
    frame.extend(&op.as_bytes()[..text]);
    frame.resize(HEADER + TEXT, 0);
    if message.len() <= ROOM {
        frame.extend(message);
    }
    frame.resize(SIZE, 0);
    frame
}

/// Reads a frame; `None` if the bytes are none.
pub(super) fn read(frame: &[u8]) -> Option<Frame<'_>> {
    let number =
        |from: usize| Some(u64::from_le_bytes(frame.get(from..from + 8)?.try_into().ok()?));
    let (hash, length) = (number(0)?, usize::try_from(number(8)?).ok()?);
    let text = usize::from(u16::from_le_bytes(frame.get(16..18)?.try_into().ok()?));
    let op = String::from_utf8_lossy(frame.get(HEADER..HEADER + text.min(TEXT))?).into_owned();
    let message = frame.get(HEADER + TEXT..)?;
    Some(Frame { hash, op, length, inline: message.get(..length).unwrap_or_default() })
}

/// Says what each rank does, with one entry for all ranks that do the same; `None` if all ranks do the same.
pub(super) fn difference(frames: &[Frame<'_>]) -> Option<String> {
    let mut kinds: Vec<(&Frame<'_>, Vec<usize>)> = vec![];
    for (rank, frame) in frames.iter().enumerate() {
        match kinds.iter_mut().find(|(known, _)| known.hash == frame.hash) {
            Some((_, ranks)) => ranks.push(rank),
            None => kinds.push((frame, vec![rank])),
        }
    }
    if kinds.len() < 2 {
        return None;
    }
    let parts = kinds.into_iter().map(|(frame, ranks)| match &ranks[..] {
        [rank] => format!("rank {rank}: {}", frame.op),
        _ => format!("ranks {ranks:?}: {}", frame.op),
    });
    Some(parts.collect::<Vec<_>>().join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_hold_short_messages_and_announce_long_ones() {
        for length in [0, 1, ROOM, ROOM + 1, 100_000] {
            let message: Vec<u8> = (0..length).map(|i| i as u8).collect();
            let bytes = write("all_gather", &message);
            assert_eq!(bytes.len(), SIZE);
            let frame = read(&bytes).unwrap();
            assert_eq!((frame.op.as_str(), frame.length), ("all_gather", length));
            assert_eq!(frame.inline, if length <= ROOM { &message[..] } else { &[] });
        }
        assert_eq!(read(&[0; 17]), None);
    }

    #[test]
    fn a_difference_names_ranks_and_operations() {
        let long = format!("agree on {}", "ä".repeat(200));
        let frames = [write("barrier", &[]), write(&long, &[]), write("barrier", &[1])];
        let frames: Vec<_> = frames.iter().map(|frame| read(frame).unwrap()).collect();
        let text = difference(&frames).unwrap();
        assert!(text.starts_with("ranks [0, 2]: barrier; rank 1: agree on ää"), "{text}");
        assert_eq!(difference(&frames[..1]), None);
        // These texts differ only after the point where they are cut off.
        let other = write(&format!("{long}!"), &[]);
        assert!(difference(&[read(&write(&long, &[])).unwrap(), read(&other).unwrap()]).is_some());
    }
}
