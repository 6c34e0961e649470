package machine

import (
	"errors"
	"strconv"

	"golang.org/x/net/http2/hpack"
)

// Errors of Connect.
var (
	ErrDraining = errors.New("http2: the connection takes no new streams")
	ErrFull     = errors.New("http2: the peer's limit of streams is reached")
)

// spareWindow is how much of the connection's window streams that send much leave to those that do not, in bytes. Of a
// small window it is an eighth: the peer may give credit only when most of it is used.
const spareWindow = 64 << 10

// Stream is one CONNECT. User is the owner's.
type Stream struct {
	User any

	c        *Conn
	id       uint32
	sendWin  int64
	recvWin  int64
	credit   int64 // consumed and not yet told to the peer
	held     int64 // received and not yet consumed
	sentEnd  bool
	gotEnd   bool
	gone     bool // no longer in Conn.streams
	answered bool
}

func (c *Conn) newStream(id uint32) *Stream {
	s := &Stream{c: c, id: id, sendWin: c.initWin, recvWin: int64(c.cfg.StreamWindow)}
	c.streams[id] = s
	return s
}

// ID is the stream identifier.
func (s *Stream) ID() uint32 { return s.id }

// Gone says that the stream has ended in both directions or was reset.
func (s *Stream) Gone() bool { return s.gone }

// Connect opens a stream to authority (client). header holds the fields beside the pseudo-header, names in lower case.
func (c *Conn) Connect(authority string, header []hpack.HeaderField) (*Stream, error) {
	switch {
	case c.err != nil:
		return nil, c.err
	case c.Draining() || c.nextID > maxWindow:
		return nil, ErrDraining
	case len(c.streams) >= c.peerStreams:
		return nil, ErrFull
	}
	s := c.newStream(c.nextID)
	c.nextID += 2
	fields := make([]hpack.HeaderField, 0, 2+len(header))
	fields = append(fields, hpack.HeaderField{Name: ":method", Value: "CONNECT"},
		hpack.HeaderField{Name: ":authority", Value: authority})
	c.headerBlock(s.id, false, append(fields, header...))
	return s, nil
}

// Answer answers a Request (server). With end the stream is over: what the peer still sends is dropped.
func (s *Stream) Answer(status int, header []hpack.HeaderField, end bool) {
	if s.gone || s.answered || s.c.err != nil {
		return
	}
	s.answered = true
	fields := make([]hpack.HeaderField, 0, 1+len(header))
	fields = append(fields, hpack.HeaderField{Name: ":status", Value: strconv.Itoa(status)})
	s.c.headerBlock(s.id, end, append(fields, header...))
	if !end {
		return
	}
	if s.sentEnd = true; !s.gotEnd {
		s.c.out = appendUint32Frame(s.c.out, frameReset, s.id, CodeNo)
	}
	s.remove(true)
}

// Budget is how many bytes of payload the next DATA frame may carry; 0 = none now.
func (s *Stream) Budget() int { return min(s.Window(), s.c.peerFrame) }

// Window is how many bytes of payload may be sent now, in any number of frames of which none is longer than 16 KiB.
func (s *Stream) Window() int {
	if s.gone || s.sentEnd || s.c.err != nil {
		return 0
	}
	return int(max(0, min(s.sendWin, s.c.sendWin)))
}

// BulkWindow is Window for a stream that sends much: it leaves some of the connection's window to the others.
func (s *Stream) BulkWindow() int {
	spare := min(spareWindow, s.c.sendPeak/8)
	return max(0, min(s.Window(), int(s.c.sendWin-spare)))
}

// DataHeader writes the header of a DATA frame of n bytes, n at most Budget, to b[:HeaderLen] and counts it as sent. An
// end needs no budget when n is 0.
func (s *Stream) DataHeader(b []byte, n int, end bool) {
	var flags byte
	if end {
		flags = flagEndStream
	}
	putHeader(b, n, frameData, flags, s.id)
	s.sendWin -= int64(n)
	s.c.sendWin -= int64(n)
	if end {
		s.sentEnd = true
		s.maybeRemove()
	}
}

// SentEnd says that this side's direction has ended.
func (s *Stream) SentEnd() bool { return s.sentEnd }

// Consumed says that n bytes of Data were passed on, so that the peer may send as many more.
func (s *Stream) Consumed(n int) {
	k := min(int64(n), s.held)
	s.held -= k
	if k == 0 || s.c.err != nil {
		return
	}
	s.c.giveConn(k)
	if s.gotEnd || s.gone {
		return
	}
	if s.credit += k; s.credit >= int64(s.c.cfg.StreamWindow)/4 {
		s.recvWin += s.credit
		s.c.out = appendUint32Frame(s.c.out, frameWindowUpdate, s.id, uint32(s.credit))
		s.credit = 0
	}
}

// Reset ends the stream at once; unless it is already over, the peer is told by RST_STREAM. Data that was not consumed
// counts as dropped.
func (s *Stream) Reset(code uint32) {
	if !s.gone && s.c.err == nil {
		s.c.out = appendUint32Frame(s.c.out, frameReset, s.id, code)
	}
	s.remove(true)
}

func (s *Stream) maybeRemove() {
	if s.sentEnd && s.gotEnd {
		s.remove(false)
	}
}

// remove takes the stream out of the table. The connection's window gets back what drop throws away.
func (s *Stream) remove(drop bool) {
	if drop && s.held > 0 {
		n := s.held
		s.held = 0
		if s.c.err == nil {
			s.c.giveConn(n)
		}
	}
	if !s.gone {
		s.gone = true
		delete(s.c.streams, s.id)
	}
}
