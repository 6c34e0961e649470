package machine

import (
	"encoding/binary"
	"strings"
)

// input is the state of the parser between two calls of Next.
type input struct {
	preface string // what of the client's preface is still to come
	begun   bool   // the peer's first SETTINGS was seen

	hdr     [HeaderLen]byte
	hdrn    int
	open    bool // inside a frame
	typ     byte
	flags   byte
	id      uint32
	left    int // payload bytes of the frame still to come
	pad     int // of these, padding at the end; -1 = the length is not read yet
	dst     *Stream
	payload []byte // of a control frame, being collected

	block    []byte // header block being collected
	blockID  uint32 // its stream while CONTINUATION must follow, else 0
	blockEnd bool   // its HEADERS had END_STREAM
}

// Next takes bytes from the front of in up to the next event and returns how many. Kind None means that all were taken
// and more are needed. An error (always *ConnError) is final.
func (c *Conn) Next(in []byte) (ev Event, n int, err error) {
	start := len(in)
	for {
		if len(c.pending) > 0 {
			ev = c.pending[0]
			if c.pending = c.pending[1:]; len(c.pending) == 0 {
				c.pending = nil
			}
			return ev, start - len(in), nil
		}
		if c.err != nil {
			return Event{}, start - len(in), c.err
		}
		if len(in) == 0 && !(c.in.open && c.in.left == 0) {
			return Event{}, start, nil
		}
		if c.in.preface != "" {
			if in, err = c.takePreface(in); err != nil {
				return Event{}, start - len(in), err
			}
			continue
		}
		if !c.in.open {
			if in, err = c.takeHeader(in); err != nil {
				return Event{}, start - len(in), err
			}
			continue
		}
		if c.in.typ == frameData {
			ev, in, err = c.takeData(in)
		} else {
			ev, in, err = c.takeControl(in)
		}
		if err != nil || ev.Kind != None {
			return ev, start - len(in), err
		}
	}
}

func (c *Conn) takePreface(in []byte) ([]byte, error) {
	k := min(len(in), len(c.in.preface))
	if string(in[:k]) != c.in.preface[:k] {
		return in, c.fail(CodeProtocol, "not an HTTP/2 client")
	}
	c.in.preface = c.in.preface[k:]
	return in[k:], nil
}

// takeHeader collects a frame header and opens the frame when it is whole and legal.
func (c *Conn) takeHeader(in []byte) ([]byte, error) {
	i := &c.in
	k := copy(i.hdr[i.hdrn:], in)
	i.hdrn += k
	in = in[k:]
	if i.hdrn < HeaderLen {
		return in, nil
	}
	i.hdrn = 0
	h := &i.hdr
	i.left = int(h[0])<<16 | int(h[1])<<8 | int(h[2])
	i.typ, i.flags = h[3], h[4]
	i.id = binary.BigEndian.Uint32(h[5:]) & maxWindow
	i.open, i.pad = true, 0
	switch {
	case i.left > c.cfg.MaxFrame:
		return in, c.fail(CodeFrameSize, "frame longer than offered")
	case !i.begun && (i.typ != frameSettings || i.flags&flagAck != 0):
		return in, c.fail(CodeProtocol, "the first frame is not SETTINGS")
	case i.blockID != 0 && (i.typ != frameContinuation || i.id != i.blockID):
		return in, c.fail(CodeProtocol, "a header block is not continued")
	case i.typ == frameData:
		return in, c.beginData()
	case i.typ <= frameContinuation && i.left > c.controlLimit():
		return in, c.fail(CodeFrameSize, "control frame too long")
	}
	return in, nil
}

// controlLimit is the longest payload of a known control frame that this side will collect.
func (c *Conn) controlLimit() int {
	switch c.in.typ {
	case frameHeaders, frameContinuation:
		return c.cfg.MaxHeaderList + 256 + 6 // padding and priority
	case frameSettings:
		return 6 * 64
	case frameGoAway:
		return minFrame
	}
	return 8
}

// beginData counts a DATA frame against the windows; padding counts as payload does.
func (c *Conn) beginData() error {
	i := &c.in
	if i.id == 0 {
		return c.fail(CodeProtocol, "DATA without a stream")
	}
	if int64(i.left) > c.recvWin {
		return c.fail(CodeFlowControl, "DATA beyond the connection's window")
	}
	c.recvWin -= int64(i.left)
	c.tellCredit()
	i.dst = c.streams[i.id]
	if i.dst == nil {
		if c.idle(i.id) {
			return c.fail(CodeProtocol, "DATA on an idle stream")
		}
		// In flight when the stream was reset. Short frames of this sort are a flood sooner than full ones.
		if i.left < 256 {
			if err := c.spend(costEmpty); err != nil {
				return err
			}
		}
	} else {
		if i.dst.gotEnd {
			return c.fail(CodeStreamClosed, "DATA after the end of the stream")
		}
		if int64(i.left) > i.dst.recvWin {
			return c.fail(CodeFlowControl, "DATA beyond the stream's window")
		}
		i.dst.recvWin -= int64(i.left)
		i.dst.held += int64(i.left)
	}
	if i.left == 0 && i.flags&flagEndStream == 0 {
		if err := c.spend(costEmpty); err != nil {
			return err
		}
	}
	if i.flags&flagPadded != 0 {
		if i.left == 0 {
			return c.fail(CodeFrameSize, "padded DATA without a length of padding")
		}
		i.pad = -1
	}
	return nil
}

// idle says that nothing was ever heard of stream id.
func (c *Conn) idle(id uint32) bool {
	if id%2 == 0 {
		return true // no one pushes
	}
	if c.cfg.Server {
		return id > c.lastPeer
	}
	return id >= c.nextID
}

// takeData gives the payload that in holds; one frame may come as several events.
func (c *Conn) takeData(in []byte) (Event, []byte, error) {
	i := &c.in
	if i.pad < 0 {
		i.pad = int(in[0])
		i.left--
		in = in[1:]
		if i.pad > i.left {
			return Event{}, in, c.fail(CodeProtocol, "more padding than payload")
		}
		c.dropped(1)
		return Event{}, in, nil
	}
	k := min(len(in), i.left-i.pad)
	b := in[:k]
	in = in[k:]
	i.left -= k
	if i.left == i.pad && i.pad > 0 {
		d := min(len(in), i.pad)
		i.left -= d
		i.pad -= d
		in = in[d:]
		c.dropped(d)
	}
	end := i.left == 0 && i.flags&flagEndStream != 0
	s := i.dst
	if s != nil && s.gone { // reset by the owner in the middle of the frame
		s = nil
	}
	if s == nil {
		c.droppedUnowned(i.dst, k)
	}
	if i.left == 0 {
		i.open, i.dst = false, nil
	}
	if s == nil || (k == 0 && !end) {
		return Event{}, in, nil
	}
	if end {
		s.gotEnd = true
		s.maybeRemove()
	}
	return Event{Kind: Data, Stream: s, Data: b, End: end}, in, nil
}

// dropped returns the credit of n bytes of the current frame that no owner will see.
func (c *Conn) dropped(n int) {
	if s := c.in.dst; s != nil && !s.gone {
		s.Consumed(n)
		return
	}
	c.droppedUnowned(c.in.dst, n)
}

// droppedUnowned returns connection credit for n bytes that came for a stream that is gone. Those of a stream that went
// while its frame was open were returned when it was removed.
func (c *Conn) droppedUnowned(was *Stream, n int) {
	if was == nil {
		c.giveConn(int64(n))
	}
}

// takeControl collects the payload of a control frame, without a copy when in holds all of it, and handles it.
func (c *Conn) takeControl(in []byte) (Event, []byte, error) {
	i := &c.in
	k := min(len(in), i.left)
	b := in[:k]
	in = in[k:]
	i.left -= k
	if i.typ > frameContinuation { // unknown types are skipped, RFC 9113 §5.5
		if i.left == 0 {
			i.open = false
			return Event{}, in, c.spend(costEmpty)
		}
		return Event{}, in, nil
	}
	if i.left > 0 || len(i.payload) > 0 {
		i.payload = append(i.payload, b...)
		b = i.payload
	}
	if i.left > 0 {
		return Event{}, in, nil
	}
	i.open, i.payload = false, nil
	ev, err := c.control(b)
	return ev, in, err
}

func (c *Conn) control(p []byte) (Event, error) {
	i := &c.in
	switch i.typ {
	case frameHeaders:
		return c.onHeaders(p)
	case frameContinuation:
		return c.onContinuation(p)
	case frameReset:
		return c.onReset(p)
	case frameSettings:
		return c.onSettings(p)
	case framePing:
		return c.onPing(p)
	case frameGoAway:
		return c.onGoAway(p)
	case frameWindowUpdate:
		return c.onWindowUpdate(p)
	case framePriority:
		if i.id == 0 || len(p) != 5 {
			return Event{}, c.fail(CodeProtocol, "bad PRIORITY")
		}
		return Event{}, c.spend(costEmpty)
	}
	return Event{}, c.fail(CodeProtocol, "PUSH_PROMISE")
}

func (c *Conn) onReset(p []byte) (Event, error) {
	if c.in.id == 0 || c.idle(c.in.id) {
		return Event{}, c.fail(CodeProtocol, "RST_STREAM of an idle stream")
	}
	if len(p) != 4 {
		return Event{}, c.fail(CodeFrameSize, "bad RST_STREAM")
	}
	s := c.streams[c.in.id]
	if s == nil {
		return Event{}, c.spend(costEmpty)
	}
	if c.cfg.Server && !s.answered {
		if err := c.spend(costReset); err != nil {
			return Event{}, err
		}
	}
	s.remove(true)
	return Event{Kind: Reset, Stream: s, Code: binary.BigEndian.Uint32(p)}, nil
}

func (c *Conn) onPing(p []byte) (Event, error) {
	switch {
	case c.in.id != 0:
		return Event{}, c.fail(CodeProtocol, "PING on a stream")
	case len(p) != 8:
		return Event{}, c.fail(CodeFrameSize, "bad PING")
	case c.in.flags&flagAck != 0:
		return Event{Kind: Pong}, c.spend(costPing)
	}
	c.out = append(appendHeader(c.out, 8, framePing, flagAck, 0), p...)
	return Event{}, c.spend(costPing)
}

func (c *Conn) onGoAway(p []byte) (Event, error) {
	if c.in.id != 0 || len(p) < 8 {
		return Event{}, c.fail(CodeProtocol, "bad GOAWAY")
	}
	if err := c.spend(costSettings); err != nil {
		return Event{}, err
	}
	c.gotGoAway = true
	last, code := binary.BigEndian.Uint32(p)&maxWindow, binary.BigEndian.Uint32(p[4:])
	if !c.cfg.Server {
		for id, s := range c.streams {
			if id > last {
				s.remove(true)
				c.pending = append(c.pending, Event{Kind: Reset, Stream: s, Code: CodeRefusedStream})
			}
		}
	}
	return Event{Kind: GoAway, Code: code}, nil
}

func (c *Conn) onWindowUpdate(p []byte) (Event, error) {
	if len(p) != 4 {
		return Event{}, c.fail(CodeFrameSize, "bad WINDOW_UPDATE")
	}
	n := int64(binary.BigEndian.Uint32(p) & maxWindow)
	if c.in.id == 0 {
		if n == 0 {
			return Event{}, c.fail(CodeProtocol, "WINDOW_UPDATE by nothing")
		}
		if c.sendWin += n; c.sendWin > maxWindow {
			return Event{}, c.fail(CodeFlowControl, "connection window too large")
		}
		c.sendPeak = max(c.sendPeak, c.sendWin)
		return Event{Kind: Writable}, c.spendOpening(n)
	}
	s := c.streams[c.in.id]
	if s == nil {
		if c.idle(c.in.id) {
			return Event{}, c.fail(CodeProtocol, "WINDOW_UPDATE of an idle stream")
		}
		return Event{}, c.spend(costEmpty) // in flight when the stream ended
	}
	if n == 0 || s.sendWin+n > maxWindow {
		code := uint32(CodeProtocol)
		if n != 0 {
			code = CodeFlowControl
		}
		s.Reset(code)
		return Event{Kind: Reset, Stream: s, Code: code}, c.spend(costReset)
	}
	s.sendWin += n
	return Event{Kind: Writable, Stream: s}, c.spendOpening(n)
}

func (c *Conn) onSettings(p []byte) (Event, error) {
	if c.in.id != 0 {
		return Event{}, c.fail(CodeProtocol, "SETTINGS on a stream")
	}
	if c.in.flags&flagAck != 0 {
		if len(p) != 0 {
			return Event{}, c.fail(CodeFrameSize, "SETTINGS acknowledgement with a payload")
		}
		return Event{}, c.spend(costPing)
	}
	if len(p)%6 != 0 {
		return Event{}, c.fail(CodeFrameSize, "bad SETTINGS")
	}
	c.in.begun = true
	for ; len(p) > 0; p = p[6:] {
		if err := c.setting(binary.BigEndian.Uint16(p), binary.BigEndian.Uint32(p[2:])); err != nil {
			return Event{}, err
		}
	}
	c.out = appendHeader(c.out, 0, frameSettings, flagAck, 0)
	c.pending = append(c.pending, Event{Kind: Writable})
	return Event{Kind: Settings}, c.spend(costSettings)
}

func (c *Conn) setting(id uint16, v uint32) error {
	switch id {
	case settingTableSize:
		c.peerTable = min(v, tableSize)
		c.henc.SetMaxDynamicTableSizeLimit(c.peerTable)
		c.henc.SetMaxDynamicTableSize(c.peerTable)
	case settingPush:
		if v > 1 || (v == 1 && !c.cfg.Server) {
			return c.fail(CodeProtocol, "bad ENABLE_PUSH")
		}
	case settingMaxStreams:
		c.peerStreams = int(min(v, maxWindow))
	case settingStreamWindow:
		if v > maxWindow {
			return c.fail(CodeFlowControl, "stream window too large")
		}
		d := int64(v) - c.initWin
		c.initWin = int64(v)
		for _, s := range c.streams {
			if s.sendWin += d; s.sendWin > maxWindow {
				return c.fail(CodeFlowControl, "stream window too large")
			}
		}
	case settingMaxFrame:
		if v < minFrame || v > 1<<24-1 {
			return c.fail(CodeProtocol, "bad MAX_FRAME_SIZE")
		}
		c.peerFrame = int(v)
	}
	return nil
}

// lowerToken says that a field name is legal in HTTP/2 as far as this package cares: not empty, no upper case.
func lowerToken(s string) bool {
	return s != "" && !strings.ContainsFunc(s, func(r rune) bool { return r >= 'A' && r <= 'Z' || r <= ' ' || r >= 0x7f })
}
