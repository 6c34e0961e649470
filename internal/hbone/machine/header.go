package machine

import (
	"strconv"

	"golang.org/x/net/http2/hpack"
)

// headerList takes the fields of one header block. What goes beyond the limits is decoded (the table must stay in step)
// but not kept.
type headerList struct {
	max     int
	size    int
	tooBig  bool
	bad     bool // malformed, RFC 9113 §8.1.1
	fields  []hpack.HeaderField
	method  string
	auth    string
	other   bool // :scheme, :path or :protocol
	status  int
	regular bool // pseudo-headers may no longer come
}

func (l *headerList) add(f hpack.HeaderField) {
	l.size += len(f.Name) + len(f.Value) + 32
	if l.size > l.max || len(l.fields) >= maxHeaderFields {
		l.tooBig = true
		return
	}
	if f.Name == "" || f.Name[0] != ':' {
		l.regular = true
		if !lowerToken(f.Name) {
			l.bad = true
			return
		}
		l.fields = append(l.fields, f)
		return
	}
	if l.regular {
		l.bad = true
		return
	}
	switch f.Name {
	case ":method":
		l.bad = l.bad || l.method != ""
		l.method = f.Value
	case ":authority":
		l.bad = l.bad || l.auth != ""
		l.auth = f.Value
	case ":status":
		n, err := strconv.Atoi(f.Value)
		l.bad = l.bad || err != nil || l.status != 0 || n < 100 || n > 999
		l.status = n
	case ":scheme", ":path", ":protocol":
		l.other = true
	default:
		l.bad = true
	}
}

// onHeaders takes a HEADERS frame; a block that is not whole waits for its CONTINUATIONs.
func (c *Conn) onHeaders(p []byte) (Event, error) {
	i := &c.in
	if i.id == 0 || i.id%2 == 0 {
		return Event{}, c.fail(CodeProtocol, "HEADERS on a stream that no client opens")
	}
	pad := 0
	if i.flags&flagPadded != 0 {
		if len(p) == 0 {
			return Event{}, c.fail(CodeFrameSize, "padded HEADERS without a length of padding")
		}
		pad = int(p[0])
		p = p[1:]
	}
	if i.flags&flagPriority != 0 {
		if len(p) < 5 {
			return Event{}, c.fail(CodeFrameSize, "HEADERS cut short")
		}
		p = p[5:]
	}
	if pad > len(p) {
		return Event{}, c.fail(CodeProtocol, "more padding than header block")
	}
	p = p[:len(p)-pad]
	i.blockEnd = i.flags&flagEndStream != 0
	if i.flags&flagEndHeaders != 0 {
		return c.onBlock(i.id, p)
	}
	i.blockID = i.id
	i.block = append([]byte(nil), p...)
	return Event{}, nil
}

func (c *Conn) onContinuation(p []byte) (Event, error) {
	i := &c.in
	if i.blockID == 0 {
		return Event{}, c.fail(CodeProtocol, "CONTINUATION of nothing")
	}
	if len(i.block)+len(p) > c.cfg.MaxHeaderList+256 {
		return Event{}, c.fail(CodeCalm, "header block too long")
	}
	i.block = append(i.block, p...)
	if i.flags&flagEndHeaders == 0 {
		return Event{}, c.spend(costEmpty)
	}
	b := i.block
	i.block, i.blockID = nil, 0
	return c.onBlock(i.id, b)
}

// onBlock decodes a whole header block.
func (c *Conn) onBlock(id uint32, block []byte) (Event, error) {
	l := &c.list
	*l = headerList{max: c.cfg.MaxHeaderList}
	defer func() { c.list = headerList{} }()
	_, err := c.hdec.Write(block)
	if err == nil {
		err = c.hdec.Close()
	}
	if err != nil {
		return Event{}, c.fail(CodeCompression, "header block: "+err.Error())
	}
	if s := c.streams[id]; s != nil {
		return c.laterBlock(s, l)
	}
	switch {
	case !c.cfg.Server && c.idle(id):
		return Event{}, c.fail(CodeProtocol, "HEADERS on an idle stream")
	case !c.cfg.Server, id <= c.lastPeer: // of a stream that was reset meanwhile
		return Event{}, c.spend(costEmpty)
	case c.sentGoAway: // the peer learns from the GOAWAY that its stream was not looked at
		return Event{}, c.spend(costEmpty)
	}
	c.lastPeer = id
	return c.request(id, l)
}

// request opens a stream for a CONNECT (server), or answers what is none.
func (c *Conn) request(id uint32, l *headerList) (Event, error) {
	if len(c.streams) >= c.cfg.MaxStreams {
		return c.refuse(id, CodeRefusedStream)
	}
	if l.bad || l.status != 0 || l.method == "" {
		return c.refuse(id, CodeProtocol)
	}
	status := 0
	switch {
	case l.tooBig:
		status = 431
	case l.method != "CONNECT":
		status = 405
	case l.other || l.auth == "":
		return c.refuse(id, CodeProtocol)
	}
	s := c.newStream(id)
	if c.in.blockEnd {
		s.gotEnd = true
	}
	if status != 0 {
		s.Answer(status, nil, true)
		return Event{}, c.spend(costReset)
	}
	return Event{Kind: Request, Stream: s, Authority: l.auth, Header: l.fields, End: c.in.blockEnd}, nil
}

func (c *Conn) refuse(id, code uint32) (Event, error) {
	c.out = appendUint32Frame(c.out, frameReset, id, code)
	return Event{}, c.spend(costReset)
}

// laterBlock is the answer to a CONNECT (client) or trailers, which only end the stream.
func (c *Conn) laterBlock(s *Stream, l *headerList) (Event, error) {
	end := c.in.blockEnd
	if s.gotEnd {
		return Event{}, c.fail(CodeStreamClosed, "HEADERS after the end of the stream")
	}
	if !c.cfg.Server && !s.answered {
		switch {
		case l.bad || l.tooBig || l.status == 0 || l.method != "":
			s.Reset(CodeProtocol)
			return Event{Kind: Reset, Stream: s, Code: CodeProtocol}, nil
		case l.status < 200 && !end:
			return Event{}, c.spend(costEmpty) // informational
		}
		s.answered = true
		ev := Event{Kind: Answer, Stream: s, Status: l.status, Header: l.fields, End: end}
		if end {
			s.gotEnd = true
			s.maybeRemove()
		}
		return ev, nil
	}
	if !end || l.status != 0 || l.method != "" {
		s.Reset(CodeProtocol)
		return Event{Kind: Reset, Stream: s, Code: CodeProtocol}, c.spend(costReset)
	}
	s.gotEnd = true
	s.maybeRemove()
	return Event{Kind: Data, Stream: s, End: true}, nil
}
