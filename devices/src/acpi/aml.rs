//! As much of the AML grammar (ACPI 6.4, chapter 20) as the DSDT needs. Every function returns
//! encoded bytes; bodies are concatenations.

/// PkgLength in front of `body`.
fn with_length(body: &[u8]) -> Vec<u8> {
    // The length counts its own bytes.
    let n = body.len();
    let mut out = if n + 1 < 0x40 {
        vec![(n + 1) as u8]
    } else if n + 2 < 0x1000 {
        let l = n + 2;
        vec![0x40 | (l & 15) as u8, (l >> 4) as u8]
    } else {
        let l = n + 3;
        vec![0x80 | (l & 15) as u8, (l >> 4) as u8, (l >> 12) as u8]
    };
    out.extend_from_slice(body);
    out
}

/// A length in bits, as field lists have it (no body).
fn field_length(bits: usize) -> Vec<u8> {
    if bits < 0x40 {
        vec![bits as u8]
    } else {
        vec![0x40 | (bits & 15) as u8, (bits >> 4) as u8]
    }
}

/// A name: segments separated by dots, with an optional leading backslash.
pub fn path(name: &str) -> Vec<u8> {
    let mut out = Vec::new();
    let rest = match name.strip_prefix('\\') {
        Some(rest) => {
            out.push(b'\\');
            rest
        }
        None => name,
    };
    if rest.is_empty() {
        out.push(0);
        return out;
    }
    let segments: Vec<&str> = rest.split('.').collect();
    match segments.len() {
        1 => {}
        2 => out.push(0x2E),
        n => out.extend([0x2F, n as u8]),
    }
    for s in segments {
        let mut seg = [b'_'; 4];
        for (to, from) in seg.iter_mut().zip(s.bytes()) {
            *to = from;
        }
        out.extend(seg);
    }
    out
}

/// An integer in its shortest form.
pub fn int(value: u64) -> Vec<u8> {
    match value {
        0 => vec![0],
        1 => vec![1],
        v if v <= 0xFF => vec![0x0A, v as u8],
        v if v <= 0xFFFF => [&[0x0B][..], &(v as u16).to_le_bytes()].concat(),
        v if v <= 0xFFFF_FFFF => [&[0x0C][..], &(v as u32).to_le_bytes()].concat(),
        v => [&[0x0E][..], &v.to_le_bytes()].concat(),
    }
}

/// A string.
pub fn string(text: &str) -> Vec<u8> {
    [&[0x0D], text.as_bytes(), &[0]].concat()
}

/// An EISA id such as PNP0A03 as an integer.
pub fn eisa(id: &str) -> Vec<u8> {
    let b = id.as_bytes();
    let letter = |i: usize| u32::from(b[i] - 0x40) & 31;
    let hex = |i: usize| (b[i] as char).to_digit(16).unwrap_or(0);
    let value = letter(0) << 26
        | letter(1) << 21
        | letter(2) << 16
        | hex(3) << 12
        | hex(4) << 8
        | hex(5) << 4
        | hex(6);
    [&[0x0C][..], &value.to_be_bytes()].concat()
}

fn block(op: &[u8], parts: &[Vec<u8>]) -> Vec<u8> {
    [op, &with_length(&parts.concat())].concat()
}

/// `Name (n, value)`.
pub fn name(n: &str, value: Vec<u8>) -> Vec<u8> {
    [vec![0x08], path(n), value].concat()
}

/// `Scope (n) { body }`.
pub fn scope(n: &str, body: &[Vec<u8>]) -> Vec<u8> {
    block(&[0x10], &[path(n), body.concat()])
}

/// `Device (n) { body }`.
pub fn device(n: &str, body: &[Vec<u8>]) -> Vec<u8> {
    block(&[0x5B, 0x82], &[path(n), body.concat()])
}

/// `Method (n, args, Serialized) { body }`.
pub fn method(n: &str, args: u8, body: &[Vec<u8>]) -> Vec<u8> {
    block(&[0x14], &[path(n), vec![args | 8], body.concat()])
}

/// `Package () { elements }`.
pub fn package(elements: &[Vec<u8>]) -> Vec<u8> {
    block(&[0x12], &[vec![elements.len() as u8], elements.concat()])
}

/// A buffer with these bytes.
pub fn buffer(bytes: &[u8]) -> Vec<u8> {
    block(&[0x11], &[int(bytes.len() as u64), bytes.to_vec()])
}

/// A resource template: the descriptors and the end tag.
pub fn resources(descriptors: &[Vec<u8>]) -> Vec<u8> {
    buffer(&[descriptors.concat(), vec![0x79, 0]].concat())
}

/// `OperationRegion (n, space, offset, length)`.
pub fn region(n: &str, space: u8, offset: u64, length: u64) -> Vec<u8> {
    [vec![0x5B, 0x80], path(n), vec![space], int(offset), int(length)].concat()
}

/// `Field (region, ByteAcc, NoLock, Preserve) { names }`, a byte each.
pub fn byte_fields(region: &str, names: &[&str]) -> Vec<u8> {
    let fields: Vec<Vec<u8>> = names.iter().map(|n| [path(n), field_length(8)].concat()).collect();
    block(&[0x5B, 0x81], &[path(region), vec![1], fields.concat()])
}

/// `Return (value)`.
pub fn ret(value: Vec<u8>) -> Vec<u8> {
    [vec![0xA4], value].concat()
}

/// `Store (value, target)`.
pub fn store(value: Vec<u8>, target: Vec<u8>) -> Vec<u8> {
    [vec![0x70], value, target].concat()
}

/// `And (a, b)` with the result as a value.
pub fn and(a: Vec<u8>, b: Vec<u8>) -> Vec<u8> {
    [vec![0x7B], a, b, vec![0]].concat()
}

/// `Or (a, b, target)`.
pub fn or(a: Vec<u8>, b: Vec<u8>, target: Vec<u8>) -> Vec<u8> {
    [vec![0x7D], a, b, target].concat()
}

/// `If (condition) { body }`.
pub fn when(condition: Vec<u8>, body: &[Vec<u8>]) -> Vec<u8> {
    block(&[0xA0], &[condition, body.concat()])
}

/// `Field (region, DWordAcc, NoLock, WriteAsZeros) { names }`, four bytes each.
pub fn dword_fields(region: &str, names: &[&str]) -> Vec<u8> {
    let fields: Vec<Vec<u8>> = names.iter().map(|n| [path(n), field_length(32)].concat()).collect();
    block(&[0x5B, 0x81], &[path(region), vec![0x43], fields.concat()])
}

/// `Notify (object, value)`.
pub fn notify(object: &str, value: u64) -> Vec<u8> {
    [vec![0x86], path(object), int(value)].concat()
}

/// Call a method.
pub fn call(n: &str, args: &[Vec<u8>]) -> Vec<u8> {
    [path(n), args.concat()].concat()
}

/// The first local variable of a method.
pub fn local0() -> Vec<u8> {
    vec![0x60]
}

/// `Else { body }`, right after [`when`].
pub fn otherwise(body: &[Vec<u8>]) -> Vec<u8> {
    block(&[0xA1], body)
}

/// `LEqual (a, b)`.
pub fn equal(a: Vec<u8>, b: Vec<u8>) -> Vec<u8> {
    [vec![0x93], a, b].concat()
}

/// `LNot (LEqual (a, b))`.
pub fn differs(a: Vec<u8>, b: Vec<u8>) -> Vec<u8> {
    [vec![0x92], equal(a, b)].concat()
}

/// `Mutex (n, 0)`.
pub fn mutex(n: &str) -> Vec<u8> {
    [vec![0x5B, 0x01], path(n), vec![0]].concat()
}

/// `Acquire (n, forever)`.
pub fn acquire(n: &str) -> Vec<u8> {
    [vec![0x5B, 0x23], path(n), vec![0xFF, 0xFF]].concat()
}

/// `Release (n)`.
pub fn release(n: &str) -> Vec<u8> {
    [vec![0x5B, 0x27], path(n)].concat()
}

/// `CreateDWordField (source, index, n)`.
pub fn dword_field(source: Vec<u8>, index: u64, n: &str) -> Vec<u8> {
    [vec![0x8A], source, int(index), path(n)].concat()
}

/// An argument of a method.
pub fn arg(n: u8) -> Vec<u8> {
    vec![0x68 + n]
}

/// `IO (Decode16, base, base, 1, length)` (6.4.2.5).
pub fn io(base: u16, length: u8) -> Vec<u8> {
    let b = base.to_le_bytes();
    vec![0x47, 1, b[0], b[1], b[0], b[1], 1, length]
}

/// `IRQNoFlags () { irq }` (6.4.2.1).
pub fn irq(irq: u8) -> Vec<u8> {
    let mask = (1u16 << irq).to_le_bytes();
    vec![0x22, mask[0], mask[1]]
}

/// `Memory32Fixed (ReadOnly, base, length)` (6.4.3.4).
pub fn memory32(base: u32, length: u32) -> Vec<u8> {
    [&[0x86, 9, 0, 0][..], &base.to_le_bytes(), &length.to_le_bytes()].concat()
}

/// `Interrupt (ResourceConsumer, Level, ActiveHigh, Shared) { gsis }` (6.4.3.6).
pub fn interrupts(gsis: &[u32]) -> Vec<u8> {
    let mut out = vec![0x89];
    out.extend(((2 + 4 * gsis.len()) as u16).to_le_bytes());
    out.extend([9, gsis.len() as u8]);
    gsis.iter().for_each(|g| out.extend(g.to_le_bytes()));
    out
}

/// What a word or dword address space descriptor covers (6.4.3.5).
#[derive(Clone, Copy)]
pub enum Space {
    Memory = 0,
    Io = 1,
    Bus = 2,
}

fn space_flags(space: Space) -> [u8; 2] {
    match space {
        // Cacheable, read-write; entire range; plain.
        Space::Memory => [0x0C, 3],
        Space::Io => [0x0C, 3],
        Space::Bus => [0x0C, 0],
    }
}

/// A producer's range `first..=last` in a word descriptor.
pub fn word_range(space: Space, first: u16, last: u16) -> Vec<u8> {
    let [general, special] = space_flags(space);
    let mut out = vec![0x88, 13, 0, space as u8, general, special];
    let length = (u32::from(last) - u32::from(first) + 1) as u16;
    [0, first, last, 0, length].iter().for_each(|v: &u16| out.extend(v.to_le_bytes()));
    out
}

/// A producer's range `first..=last` in a dword descriptor.
pub fn dword_range(space: Space, first: u32, last: u32) -> Vec<u8> {
    let [general, special] = space_flags(space);
    let mut out = vec![0x87, 23, 0, space as u8, general, special];
    [0, first, last, 0, last - first + 1].iter().for_each(|v: &u32| out.extend(v.to_le_bytes()));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encodings_agree_with_the_specification() {
        assert_eq!(eisa("PNP0A03"), [0x0C, 0x41, 0xD0, 0x0A, 0x03]);
        assert_eq!(path("\\_SB.PCI0"), b"\\\x2E_SB_PCI0");
        assert_eq!(name("_UID", int(0)), b"\x08_UID\0");
        assert_eq!(package(&[int(1)]), [0x12, 3, 1, 1]);
        assert_eq!(with_length(&[0; 0x3F])[..2], [0x41, 0x04]);
    }
}
