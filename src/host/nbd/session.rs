//! A client's conversation: options first, then requests.

use std::io::{self, Read, Write};
use std::sync::Arc;

use ftvm_block::BlockError;

use super::export::{Context, Export, Hangup, Visit};
use super::wire::{self, answer, chunk, command, export, flag, info, option, Request};

/// What a server has to offer.
pub trait Offers {
    /// The exports, in their order.
    fn exports(&self) -> Vec<Arc<Export>>;
    /// Ends this client's connection.
    fn hangup(&self) -> Hangup;
}

/// What the client has negotiated.
#[derive(Default)]
struct Session {
    no_zeroes: bool,
    structured: bool,
    /// The export whose contexts were chosen, and their numbers.
    contexts: Option<(String, Vec<u32>)>,
}

/// Serve a client until it has gone; an error is the client's, or the connection's.
pub fn serve(stream: &mut (impl Read + Write), offers: &dyn Offers) -> io::Result<()> {
    let mut session = Session::default();
    match session.negotiate(stream, offers)? {
        Some(visit) => session.requests(stream, &visit.export),
        None => Ok(()),
    }
}

fn flags(export: &Export) -> u16 {
    let mut flags =
        export::HAS_FLAGS | export::SEND_FLUSH | export::SEND_FUA | export::SEND_DF | export::SEND_CACHE;
    // All connections reach the same image, and a flush is of all of it.
    flags |= export::CAN_MULTI_CONN;
    match export.writable {
        true => flags | export::SEND_TRIM | export::SEND_WRITE_ZEROES,
        false => flags | export::READ_ONLY,
    }
}

/// The errno on the wire for one of this host.
fn wire_errno(e: &BlockError) -> u32 {
    let errno = e.errno();
    match errno {
        libc::EPERM | libc::EROFS => libc::EPERM as u32,
        libc::ENOSPC | libc::EFBIG | libc::EDQUOT => libc::ENOSPC as u32,
        libc::ENOMEM | libc::EINVAL | libc::ENOTSUP => errno as u32,
        _ => libc::EIO as u32,
    }
}

/// Why a request is refused: an errno, and words.
type Refusal = (u32, String);

fn refuse<T>(errno: i32, text: &str) -> Result<T, Refusal> {
    Err((errno as u32, text.to_owned()))
}

impl From<BlockError> for Failure {
    fn from(e: BlockError) -> Self {
        Failure((wire_errno(&e), e.to_string()))
    }
}

/// A refusal that other errors turn into.
struct Failure(Refusal);

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Failure(refusal)
    }
}

impl Session {
    /// Until the client has chosen an export; `None`: it has gone.
    fn negotiate(
        &mut self,
        stream: &mut (impl Read + Write),
        offers: &dyn Offers,
    ) -> io::Result<Option<Visit>> {
        let mut hello = wire::INIT.to_be_bytes().to_vec();
        hello.extend(wire::OPTION.to_be_bytes());
        hello.extend((wire::FIXED_NEWSTYLE | wire::NO_ZEROES).to_be_bytes());
        stream.write_all(&hello)?;
        let client = wire::u32_of(stream)?;
        let known = u32::from(wire::FIXED_NEWSTYLE | wire::NO_ZEROES);
        if client & !known != 0 || client & u32::from(wire::FIXED_NEWSTYLE) == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the client's flags are not known"));
        }
        self.no_zeroes = client & u32::from(wire::NO_ZEROES) != 0;
        loop {
            let (number, data) = wire::read_option(stream)?;
            let mut say = |kind: u32, data: &[u8]| wire::answer(stream, number, kind, data);
            let invalid = "the option's data is not what it must be".as_bytes();
            match number {
                option::EXPORT_NAME => {
                    let name = String::from_utf8_lossy(&data);
                    let Some(visit) = enter(offers, &name) else { return Ok(None) };
                    let mut out = visit.export.size().to_be_bytes().to_vec();
                    out.extend(flags(&visit.export).to_be_bytes());
                    out.resize(if self.no_zeroes { 10 } else { 134 }, 0);
                    stream.write_all(&out)?;
                    return Ok(Some(visit));
                }
                option::ABORT => {
                    // The client may have gone already.
                    let _ = say(answer::ACK, &[]);
                    return Ok(None);
                }
                option::LIST if !data.is_empty() => say(answer::INVALID, invalid)?,
                option::LIST => {
                    for export in offers.exports() {
                        let mut out = (export.name.len() as u32).to_be_bytes().to_vec();
                        out.extend(export.name.as_bytes());
                        out.extend(export.description.iter().flat_map(|d| d.bytes()));
                        say(answer::SERVER, &out)?;
                    }
                    say(answer::ACK, &[])?;
                }
                option::STARTTLS => say(answer::POLICY, b"TLS not configured")?,
                option::STRUCTURED_REPLY if !data.is_empty() => say(answer::INVALID, invalid)?,
                option::STRUCTURED_REPLY => {
                    self.structured = true;
                    say(answer::ACK, &[])?;
                }
                option::INFO | option::GO => match choice(&data) {
                    None => say(answer::INVALID, invalid)?,
                    Some((name, wanted)) => {
                        let found = offers.exports().into_iter().find(|e| e.name == name);
                        let visit = match number {
                            option::GO => enter(offers, &name),
                            _ => None,
                        };
                        let there =
                            |e: &Arc<Export>| !e.is_closing() && (number == option::INFO || visit.is_some());
                        match found.filter(there) {
                            None => say(answer::UNKNOWN, b"export not present")?,
                            Some(export) => {
                                describe(&export, &wanted, &mut say)?;
                                say(answer::ACK, &[])?;
                                if visit.is_some() {
                                    return Ok(visit);
                                }
                            }
                        }
                    }
                },
                option::LIST_META_CONTEXT | option::SET_META_CONTEXT if !self.structured => {
                    say(answer::INVALID, b"structured replies are not negotiated")?;
                }
                option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                    let set = number == option::SET_META_CONTEXT;
                    if set {
                        self.contexts = None;
                    }
                    match queries(&data) {
                        None => say(answer::INVALID, invalid)?,
                        Some((name, queries)) => {
                            let Some(export) = offers.exports().into_iter().find(|e| e.name == name) else {
                                say(answer::UNKNOWN, b"export not present")?;
                                continue;
                            };
                            let chosen = choose(&export, &queries, set);
                            for (number, name) in &chosen {
                                let number = if set { *number } else { 0 };
                                say(
                                    answer::META_CONTEXT,
                                    &[&number.to_be_bytes(), name.as_bytes()].concat(),
                                )?;
                            }
                            if set {
                                self.contexts = Some((name, chosen.into_iter().map(|(n, _)| n).collect()));
                            }
                            say(answer::ACK, &[])?;
                        }
                    }
                }
                _ => say(answer::UNSUPPORTED, b"the option is not known")?,
            }
        }
    }

    fn requests(&self, stream: &mut (impl Read + Write), export: &Export) -> io::Result<()> {
        while let Some(request) = Request::read(stream)? {
            if request.command == command::DISCONNECT {
                return Ok(());
            }
            let mut payload = Vec::new();
            if request.command == command::WRITE {
                if request.len > wire::MAX_PAYLOAD {
                    // What follows cannot be told from requests.
                    return Err(io::Error::new(io::ErrorKind::InvalidData, "a write is too long"));
                }
                payload = wire::bytes_of(stream, request.len)?;
            }
            match self.perform(stream, export, &request, &payload) {
                Ok(done) => done?,
                Err(Failure((errno, text))) if self.structured => {
                    let mut head = errno.to_be_bytes().to_vec();
                    let text = &text.as_bytes()[..text.len().min(wire::MAX_TEXT)];
                    head.extend((text.len() as u16).to_be_bytes());
                    wire::structured(stream, request.handle, (chunk::DONE, chunk::ERROR), &head, text)?;
                }
                Err(Failure((errno, _))) => wire::simple(stream, request.handle, errno, &[])?,
            }
        }
        Ok(())
    }

    /// Do what a request wants, and answer it.
    fn perform(
        &self,
        stream: &mut impl Write,
        export: &Export,
        request: &Request,
        payload: &[u8],
    ) -> Result<io::Result<()>, Failure> {
        let Request { offset, handle, .. } = *request;
        let len = u64::from(request.len);
        check(export, request)?;
        let fua = request.flags & flag::FUA != 0;
        match request.command {
            command::READ => {
                let data = export.read(offset, len)?;
                if !self.structured {
                    return Ok(wire::simple(stream, handle, 0, &data));
                }
                let head = offset.to_be_bytes();
                if !data.is_empty() && data.iter().all(|b| *b == 0) {
                    let hole = [&head[..], &request.len.to_be_bytes()].concat();
                    return Ok(wire::structured(
                        stream,
                        handle,
                        (chunk::DONE, chunk::OFFSET_HOLE),
                        &hole,
                        &[],
                    ));
                }
                return Ok(match data.is_empty() {
                    true => wire::structured(stream, handle, (chunk::DONE, chunk::NONE), &[], &[]),
                    false => {
                        wire::structured(stream, handle, (chunk::DONE, chunk::OFFSET_DATA), &head, &data)
                    }
                });
            }
            command::WRITE => export.write(offset, payload, fua)?,
            command::WRITE_ZEROES => {
                export.write_zeroes(offset, len, request.flags & flag::NO_HOLE == 0, fua)?;
            }
            command::TRIM => export.trim(offset, len, fua)?,
            command::FLUSH => export.flush()?,
            command::CACHE => {}
            _ => return self.status(stream, export, request),
        }
        Ok(match self.structured {
            true => wire::structured(stream, handle, (chunk::DONE, chunk::NONE), &[], &[]),
            false => wire::simple(stream, handle, 0, &[]),
        })
    }

    fn status(
        &self,
        stream: &mut impl Write,
        export: &Export,
        request: &Request,
    ) -> Result<io::Result<()>, Failure> {
        let chosen = match &self.contexts {
            Some((name, chosen)) if *name == export.name && !chosen.is_empty() => chosen,
            _ => return Err(Failure((libc::EINVAL as u32, "CMD_BLOCK_STATUS not negotiated".into()))),
        };
        let one = request.flags & flag::REQ_ONE != 0;
        let known: Vec<(u32, &Context)> = (0..).zip(export.contexts()).collect();
        let mut replies = Vec::new();
        for (number, context) in known.into_iter().filter(|(n, _)| chosen.contains(n)) {
            let extents = export.status(context, request.offset, u64::from(request.len), one)?;
            let mut out = number.to_be_bytes().to_vec();
            for (len, flags) in extents {
                out.extend(len.to_be_bytes());
                out.extend(flags.to_be_bytes());
            }
            replies.push(out);
        }
        let last = replies.len().saturating_sub(1);
        Ok(replies.iter().enumerate().try_for_each(|(i, reply)| {
            let done = if i == last { chunk::DONE } else { 0 };
            wire::structured(stream, request.handle, (done, chunk::BLOCK_STATUS), reply, &[])
        }))
    }
}

/// Whether an export takes a request.
fn check(export: &Export, request: &Request) -> Result<(), Refusal> {
    let writes = matches!(request.command, command::WRITE | command::WRITE_ZEROES | command::TRIM);
    if !export.writable && writes {
        return refuse(libc::EPERM, "Export is read-only");
    }
    let allowed = match request.command {
        command::READ => flag::FUA | flag::DF,
        command::WRITE_ZEROES => flag::FUA | flag::NO_HOLE,
        command::BLOCK_STATUS => flag::FUA | flag::REQ_ONE,
        command::WRITE | command::TRIM | command::FLUSH | command::CACHE => flag::FUA,
        _ => return refuse(libc::EINVAL, "the command is not known"),
    };
    if request.flags & !allowed != 0 {
        return refuse(libc::EINVAL, "unsupported flags for the command");
    }
    if request.command == command::READ && request.len > wire::MAX_PAYLOAD {
        return refuse(libc::EINVAL, "the request is too long");
    }
    if request.command == command::BLOCK_STATUS && request.len == 0 {
        return refuse(libc::EINVAL, "need non-zero length");
    }
    match request.offset.checked_add(u64::from(request.len)) {
        _ if request.command == command::FLUSH => Ok(()),
        Some(end) if end <= export.size() => Ok(()),
        _ if matches!(request.command, command::WRITE | command::WRITE_ZEROES) => {
            refuse(libc::ENOSPC, "operation past EOF")
        }
        _ => refuse(libc::EINVAL, "operation past EOF"),
    }
}

fn enter(offers: &dyn Offers, name: &str) -> Option<Visit> {
    offers.exports().into_iter().find(|e| e.name == name)?.enter(offers.hangup())
}

/// What a client wants to know of which export: the name, and the kinds of information.
fn choice(data: &[u8]) -> Option<(String, Vec<u16>)> {
    let (name, rest) = wire::text(data)?;
    let (count, rest) = rest.split_first_chunk::<2>()?;
    let kinds = rest.chunks_exact(2);
    let whole = kinds.remainder().is_empty() && kinds.len() == usize::from(u16::from_be_bytes(*count));
    whole.then(|| (name, rest.chunks_exact(2).map(|c| u16::from_be_bytes([c[0], c[1]])).collect()))
}

fn describe(
    export: &Export,
    wanted: &[u16],
    say: &mut impl FnMut(u32, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut tell = |kind: u16, data: &[u8]| say(answer::INFO, &[&kind.to_be_bytes(), data].concat());
    if wanted.contains(&info::NAME) {
        tell(info::NAME, export.name.as_bytes())?;
    }
    if let Some(text) = export.description.as_ref().filter(|_| wanted.contains(&info::DESCRIPTION)) {
        tell(info::DESCRIPTION, text.as_bytes())?;
    }
    let sizes = [1, 4096, wire::MAX_PAYLOAD].map(u32::to_be_bytes).concat();
    tell(info::BLOCK_SIZE, &sizes)?;
    tell(info::EXPORT, &[&export.size().to_be_bytes()[..], &flags(export).to_be_bytes()].concat())
}

/// Which contexts of which export a client asks for.
fn queries(data: &[u8]) -> Option<(String, Vec<String>)> {
    let (name, rest) = wire::text(data)?;
    let (count, mut rest) = rest.split_first_chunk::<4>()?;
    let mut queries = Vec::new();
    for _ in 0..u32::from_be_bytes(*count) {
        let (query, more) = wire::text(rest)?;
        queries.push(query);
        rest = more;
    }
    rest.is_empty().then_some((name, queries))
}

/// The contexts (their numbers and names) that queries mean: `set` wants whole names, a list takes beginnings.
fn choose(export: &Export, queries: &[String], set: bool) -> Vec<(u32, String)> {
    let all = (0..).zip(export.contexts()).map(|(n, context)| (n, context.name()));
    let begins = |query: &str, name: &str| {
        let is_start = matches!(query, "base:" | "qemu:" | "qemu:dirty-bitmap:");
        query == name || !set && is_start && name.starts_with(query)
    };
    all.filter(|(_, name)| !set && queries.is_empty() || queries.iter().any(|q| begins(q, name))).collect()
}
