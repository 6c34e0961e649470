package relay

import (
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// State is a relay as a value, so that another process can go on with it. The two connections' descriptors go beside it.
type State struct {
	Up, Down DirectionState // first connection to second; back
}

// DirectionState is one direction.
type DirectionState struct {
	Count int64  // bytes that the destination's socket has taken
	Held  []byte `json:",omitempty"` // bytes that it has not
	Ended bool   `json:",omitempty"` // the source has ended, and the destination was told
}

// Frozen is a relay that stands still until the owner says that it has Moved, or that it is to Resume.
type Frozen struct {
	State State
	Files [2]int // descriptors of the two connections; they are the Frozen's

	h *Handle
}

// Freeze makes the relay stand still; it is false when the relay has ended.
func (h *Handle) Freeze() (*Frozen, bool) {
	h.mu.Lock()
	if h.over() || h.frozen {
		h.mu.Unlock()
		return nil, false
	}
	h.frozen = true
	h.mu.Unlock()
	for _, c := range []*net.TCPConn{h.a, h.b} {
		_ = c.SetDeadline(time.Unix(1, 0)) // fails on a closed one, which ends by itself
	}
	<-h.stopped
	h.mu.Lock()
	over := h.finished
	h.mu.Unlock()
	if over {
		return nil, false
	}
	f := &Frozen{h: h, Files: [2]int{-1, -1}}
	err := errors.Join(h.up.state(&f.State.Up), h.down.state(&f.State.Down))
	for i, c := range []*net.TCPConn{h.a, h.b} {
		var fdErr error
		f.Files[i], fdErr = duplicate(c)
		err = errors.Join(err, fdErr)
	}
	if err != nil {
		f.Resume()
		return nil, false
	}
	return f, true
}

// state takes the direction's state; what was in its pipe is kept as bytes, here as there.
func (d *direction) state(st *DirectionState) error {
	for d.held > 0 {
		b := make([]byte, d.held)
		n, err := unix.Read(d.pipe.r, b)
		if err != nil {
			return fmt.Errorf("read from pipe: %w", err)
		}
		d.first = append(d.first, b[:n]...)
		d.held -= int64(n)
	}
	*st = DirectionState{Count: d.count.Load(), Held: d.first, Ended: d.ended.Load()}
	return nil
}

func duplicate(c *net.TCPConn) (fd int, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return -1, err
	}
	var dupErr error
	err = raw.Control(func(f uintptr) { fd, dupErr = unix.FcntlInt(f, unix.F_DUPFD_CLOEXEC, 0) })
	if err := errors.Join(err, dupErr); err != nil {
		return -1, err
	}
	return fd, nil
}

// Moved forgets the relay: another process goes on with it. Its done is not called.
func (f *Frozen) Moved() {
	f.release()
	f.h.close()
}

// Resume lets the relay go on here.
func (f *Frozen) Resume() {
	f.release()
	h := f.h
	h.mu.Lock()
	h.frozen = false
	err := h.err
	if err != nil {
		h.reset() // it was cut meanwhile
	}
	h.mu.Unlock()
	if err != nil {
		h.finish(err)
		return
	}
	for _, c := range []*net.TCPConn{h.a, h.b} {
		_ = c.SetDeadline(time.Time{}) // fails on a closed one, which the relay will see
	}
	h.run()
}

func (f *Frozen) release() {
	for _, fd := range f.Files {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

// Adopt prepares a relay that another process gives away. The descriptors are the relay's from now on, unless there is
// an error. It goes on by Start.
func Adopt(st State, files [2]int) (*Handle, error) {
	var conns [2]*net.TCPConn
	for i, fd := range files {
		own, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err == nil {
			conns[i], err = connection(own)
		}
		if err != nil {
			if i > 0 {
				conns[0].Close()
			}
			return nil, fmt.Errorf("adopt relay: %w", err)
		}
	}
	for _, fd := range files {
		unix.Close(fd)
	}
	h := newHandle(conns[0], conns[1])
	h.up.adopt(&st.Up)
	h.down.adopt(&st.Down)
	h.halfClosed.Store(st.Up.Ended || st.Down.Ended)
	return h, nil
}

func (d *direction) adopt(st *DirectionState) {
	d.count.Store(st.Count)
	d.first = st.Held
	d.ended.Store(st.Ended)
}

// connection is a TCP connection of fd, which it owns.
func connection(fd int) (*net.TCPConn, error) {
	file := os.NewFile(uintptr(fd), "connection")
	defer file.Close()
	c, err := net.FileConn(file)
	if err != nil {
		return nil, err
	}
	tcp, ok := c.(*net.TCPConn)
	if !ok {
		c.Close()
		return nil, errors.New("not a TCP connection")
	}
	return tcp, nil
}

// Start lets an adopted relay go on; done is as that of Splice.
func (h *Handle) Start(done func(Result)) {
	h.done = done
	h.mu.Lock()
	cut, ended := h.err, h.up.ended.Load() && h.down.ended.Load()
	h.mu.Unlock()
	if cut != nil || ended {
		go h.finish(cut)
		return
	}
	h.run()
}

// Discard closes this process's descriptors of an adopted relay, which the other process keeps.
func (h *Handle) Discard() { h.close() }
