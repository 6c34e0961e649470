package hbone

import (
	"syscall"

	"github.com/fairlead-mesh/fairlead/internal/hbone/machine"
	"github.com/fairlead-mesh/fairlead/internal/loop"
	"github.com/fairlead-mesh/fairlead/internal/tlsrecord"
)

// A tunnel's output. Records are filled in place: frame headers and payload go behind the space of the record header, the
// record is sealed where it lies, and one send takes all records of a turn.

// leastFrame is the room below which a record is sealed sooner than filled up, in bytes.
const leastFrame = machine.HeaderLen + 1024

func (t *loopTunnel) recordEnd() int { return t.sealed + tlsrecord.HeaderLen + tlsrecord.MaxPlain }

// mark puts the tunnel on the list of those to flush in this turn.
func (t *loopTunnel) mark() {
	if !t.dirty && !t.dead {
		t.dirty = true
		t.w.dirty = append(t.w.dirty, t)
	}
}

// room makes sure of an open record with room for a frame, after all control frames, with reserve bytes of the buffer left
// behind the record; false when the buffer is full.
func (t *loopTunnel) room(reserve int) bool {
	if t.fits(reserve) {
		return true
	}
	if t.full || !t.flush() || t.dead {
		return false
	}
	return t.fits(reserve)
}

// fits is room with what the buffer has now. The control frames come first, since they may fill the record to its end.
func (t *loopTunnel) fits(reserve int) bool {
	if !t.control() {
		return false
	}
	if t.open && t.recordEnd()-t.fill < leastFrame {
		t.seal()
	}
	return t.begin(reserve)
}

// begin opens a record if none is open; false when the buffer cannot take a whole one and reserve bytes more.
func (t *loopTunnel) begin(reserve int) bool {
	if t.buf == nil {
		t.buf = t.w.sendBuffer()
		t.sent, t.sealed = 0, 0
	}
	if t.open {
		return true
	}
	if len(t.buf)-t.sealed < tlsrecord.ControlLen+tlsrecord.HeaderLen+tlsrecord.MaxPlain+tlsrecord.TailLen+reserve {
		return false
	}
	if t.rec.UpdateDue() {
		t.keyUpdate()
	}
	t.open = true
	t.fill = t.sealed + tlsrecord.HeaderLen
	t.mark()
	return true
}

// keyUpdate appends the record of a key update; the caller has seen to room.
func (t *loopTunnel) keyUpdate() {
	b, err := t.rec.AppendKeyUpdate(t.buf[:t.sealed], false)
	t.sealed = len(b)
	if err != nil {
		t.w.loop.Post(func() { t.fail(err) })
	}
}

// seal closes the open record.
func (t *loopTunnel) seal() {
	if !t.open {
		return
	}
	t.open = false
	if n := t.fill - t.sealed - tlsrecord.HeaderLen; n > 0 {
		t.rec.Seal(t.buf[t.sealed:], n)
		t.sealed += tlsrecord.HeaderLen + n + tlsrecord.TailLen
	}
}

// control moves the machine's frames into records; false when they do not all fit.
func (t *loopTunnel) control() bool {
	for b := t.m.Output(); len(b) > 0; b = t.m.Output() {
		if t.open && t.fill == t.recordEnd() {
			t.seal()
		}
		if !t.begin(0) {
			return false
		}
		n := copy(t.buf[t.fill:t.recordEnd()], b)
		t.fill += n
		t.m.Flushed(n)
	}
	return true
}

// flush seals and sends what there is; it says whether all of it went.
func (t *loopTunnel) flush() bool {
	if t.dead {
		return true
	}
	all := t.control()
	t.seal()
	if t.rec.UpdateDue() && t.begin(0) {
		t.open = false // begin has put the update there; there is no data to go with it
	}
	if !t.send() {
		return false
	}
	if !all {
		t.mark()
		return false
	}
	if len(t.spaceApps)+len(t.spaceStreams) > 0 {
		t.wakeSpace()
	} else if t.buf != nil {
		t.w.freeSendBuffer(t.buf)
		t.buf = nil
	}
	if t.m.Draining() && t.m.Streams() == 0 {
		t.fail(nil)
	}
	return true
}

// send writes the sealed records; false when the socket did not take all of them, or broke.
func (t *loopTunnel) send() bool {
	for t.sent < t.sealed && !t.full {
		n, errno := loop.Write(t.fd, t.buf[t.sent:t.sealed])
		switch {
		case errno == syscall.EINTR:
			continue
		case errno == syscall.EAGAIN:
			t.full = true
		case errno != 0:
			t.fail(errno)
			return false
		}
		t.sent += n
		t.written += int64(n)
		t.full = t.full || t.sent < t.sealed // a short write: the socket is full, its event will come
		if t.full {
			t.life.stuck = t.w.start.Add(t.w.now)
		}
	}
	if t.sent < t.sealed {
		if t.sent > len(t.buf)/2 { // keep room for control frames and some records
			t.sealed = copy(t.buf, t.buf[t.sent:t.sealed])
			t.sent = 0
		}
		return false
	}
	t.sent, t.sealed = 0, 0
	return true
}

// wakeSpace goes on with those that waited for room in the buffer.
func (t *loopTunnel) wakeSpace() {
	apps, streams := t.spaceApps, t.spaceStreams
	t.spaceApps, t.spaceStreams = nil, nil
	for _, a := range apps {
		a.waitsSpace = false
		t.w.markApp(a)
	}
	for _, s := range streams {
		t.poke(s) // not at once: this may run in the middle of another stream's pump
	}
}
