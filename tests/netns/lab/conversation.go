package lab

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// This file is a list of what applications do with TCP. Each conversation runs in two pods' programs, and each side tells
// in words what it saw, without what must differ (ports, times): the words are the same with and without a mesh where
// TCP is the same.

// portConversations is where the first conversation's server listens; each next one has the next port.
const portConversations = 7000

// NobodyAnswers is the conversation of a client with an address; it waits three seconds for the connection.
const NobodyAnswers = "nobody answers"

// conversation is one way of using TCP.
type conversation struct {
	name string
	// client makes its connections to the address and says what it saw.
	client func(ctx context.Context, to string) string
	// server says what it saw of one connection. nil: nobody listens.
	server func(c *net.TCPConn) string
	// quiet servers are asked for no words: there are too many connections, or none.
	quiet bool
}

// once is a client with one connection.
func once(talk func(c *net.TCPConn) string) func(context.Context, string) string {
	return with(&net.Dialer{}, talk)
}

// with is a client with one connection, made by d.
func with(d *net.Dialer, talk func(c *net.TCPConn) string) func(context.Context, string) string {
	return func(ctx context.Context, to string) string {
		conn, err := d.DialContext(ctx, "tcp", to)
		if errors.Is(err, syscall.ECONNRESET) {
			return "connected, got 0 (00000000) to ECONNRESET, " // what a reader sees who is not as fast
		}
		if err != nil {
			return "connect: " + word(err)
		}
		defer conn.Close()
		return "connected, " + talk(conn.(*net.TCPConn))
	}
}

const (
	some = 300_000 // bytes, more than a window and a tunnel's frame
	much = 1 << 30
)

// conversations is the list. Its order gives the ports.
func conversations() []conversation {
	return []conversation{
		{name: "echo", client: once(func(c *net.TCPConn) string { return sends(c, some) + shut(c) + receives(c) }), server: func(c *net.TCPConn) string {
			n, err := io.Copy(c, c)
			return fmt.Sprintf("echoed %d to %s, ", n, word(err)) + shut(c)
		}},
		{name: "addresses", client: once(func(c *net.TCPConn) string {
			return fmt.Sprintf("from %s to %s, ", c.LocalAddr().(*net.TCPAddr).IP, c.RemoteAddr()) + receives(c)
		}), server: func(c *net.TCPConn) string {
			return fmt.Sprintf("from %s to %s, ", c.RemoteAddr().(*net.TCPAddr).IP, c.LocalAddr())
		}},
		{name: "half close by the client", client: once(func(c *net.TCPConn) string { return sends(c, 10) + shut(c) + receives(c) }), server: func(c *net.TCPConn) string {
			got := receives(c)
			time.Sleep(100 * time.Millisecond)
			return got + sends(c, some)
		}},
		{name: "half close by the server", client: once(func(c *net.TCPConn) string {
			got := receives(c)
			time.Sleep(100 * time.Millisecond)
			return got + sends(c, some) + shut(c)
		}), server: func(c *net.TCPConn) string { return sends(c, 10) + shut(c) + receives(c) }},
		{name: "reset by the client", client: once(func(c *net.TCPConn) string {
			said := sends(c, 10) + takes(c, 10)
			c.SetLinger(0)
			return said
		}), server: func(c *net.TCPConn) string { return takes(c, 10) + sends(c, 10) + receives(c) }},
		{name: "reset by the server", client: once(func(c *net.TCPConn) string { return sends(c, 10) + receives(c) + sends(c, 10) }), server: func(c *net.TCPConn) string {
			said := takes(c, 10)
			c.SetLinger(0)
			return said
		}},
		{name: "closed with bytes unread", client: once(func(c *net.TCPConn) string { return sends(c, 1000) + receives(c) }), server: func(c *net.TCPConn) string { return takes(c, 10) }},
		{name: "closed at once", client: once(receives), server: func(*net.TCPConn) string { return "" }},
		{name: "reset at once", client: once(receives), server: func(c *net.TCPConn) string {
			c.SetLinger(0)
			return ""
		}},
		{name: "server speaks first", client: once(func(c *net.TCPConn) string { return takes(c, 10) + sends(c, 10) + receives(c) }), server: func(c *net.TCPConn) string { return sends(c, 10) + takes(c, 10) + sends(c, 10) }},
		{name: "write after the reader has gone", client: once(func(c *net.TCPConn) string {
			said := takes(c, 10)
			time.Sleep(200 * time.Millisecond)
			c.Write(make([]byte, 10))
			time.Sleep(200 * time.Millisecond)
			return said + sends(c, 10)
		}), server: func(c *net.TCPConn) string { return sends(c, 10) }},
		{name: "idle, with keepalive", client: with(&net.Dialer{KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: time.Second, Interval: time.Second, Count: 2}}, idle), server: pong},
		{name: "idle, without keepalive", client: with(&net.Dialer{KeepAlive: -1}, idle), server: pong},
		{name: "slow reader", client: once(func(c *net.TCPConn) string {
			time.Sleep(time.Second)
			return receives(c)
		}), server: func(c *net.TCPConn) string { return sends(c, 50_000_000) }},
		{name: "urgent byte, taken in line", client: once(urgent), server: func(c *net.TCPConn) string {
			if raw, err := c.SyscallConn(); err == nil {
				raw.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_OOBINLINE, 1) })
			}
			return takes(c, 20) + receives(c)
		}},
		{name: "urgent byte", client: once(urgent), server: func(c *net.TCPConn) string { return takes(c, 20) + receives(c) }},
		{name: "fast open", client: with(&net.Dialer{Control: func(_, _ string, raw syscall.RawConn) error {
			return raw.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_FASTOPEN_CONNECT, 1) })
		}}, func(c *net.TCPConn) string { return sends(c, 10) + receives(c) }), server: pong},
		{name: "Multipath TCP", client: multipath, server: func(c *net.TCPConn) string { return takes(c, 10) + sends(c, 10) }},
		{name: "a source port again", client: samePort, server: pong, quiet: true},
		{name: "a source port twice", client: twoServers, server: pong},
		{name: "short connections", client: short, server: pong, quiet: true},
		{name: "one way, out", client: once(func(c *net.TCPConn) string { return sends(c, much) + shut(c) + receives(c) }), server: receives},
		{name: "one way, back", client: once(receives), server: func(c *net.TCPConn) string { return sends(c, much) }},
		{name: "nobody listens", client: once(receives), quiet: true},
		{name: NobodyAnswers, client: with(&net.Dialer{Timeout: 3 * time.Second}, receives), quiet: true},
		{name: "nobody listens, client speaks", client: once(func(c *net.TCPConn) string {
			// A reset that has come already is told once, by whatever is done first.
			if _, err := c.Write([]byte("hello")); err != nil {
				return fmt.Sprintf("got 0 (00000000) to %s, ", word(err))
			}
			return receives(c)
		}), quiet: true},
	}
}

// pong takes ten bytes and sends ten.
func pong(c *net.TCPConn) string { return takes(c, 10) + sends(c, 10) }

// idle says nothing for longer than a keepalive takes to give a connection up.
func idle(c *net.TCPConn) string {
	time.Sleep(5 * time.Second)
	return sends(c, 10) + receives(c)
}

// urgent sends an urgent byte (RFC 6093) amid others.
func urgent(c *net.TCPConn) string {
	said := sends(c, 10)
	raw, err := c.SyscallConn()
	if err != nil {
		return said + word(err)
	}
	var sent error
	if err := raw.Control(func(fd uintptr) { sent = unix.Sendto(int(fd), []byte("!"), unix.MSG_OOB, nil) }); err != nil {
		return said + word(err)
	}
	return said + "urgent: " + word(sent) + ", " + sends(c, 10) + shut(c) + receives(c)
}

func multipath(ctx context.Context, to string) string {
	var d net.Dialer
	d.SetMultipathTCP(true)
	return with(&d, func(c *net.TCPConn) string {
		said := sends(c, 10) + receives(c)
		used, err := c.MultipathTCP()
		return said + fmt.Sprintf("multipath %v %s", used, word(err))
	})(ctx, to)
}

// samePort uses one source port for one connection after the other: the end of the one before must not be taken for the
// next one's.
func samePort(ctx context.Context, to string) string {
	port := 20000 + 1 + os.Getpid()%5000
	for i := range 20 {
		d := &net.Dialer{LocalAddr: &net.TCPAddr{Port: port}}
		conn, err := d.DialContext(ctx, "tcp", to)
		if err != nil {
			return fmt.Sprintf("connection %d: connect: %s", i, word(err))
		}
		c := conn.(*net.TCPConn)
		if said := sends(c, 10) + takes(c, 10); said != "sent 10, got 10, " {
			return fmt.Sprintf("connection %d: %s", i, said)
		}
		c.SetLinger(0) // no TIME_WAIT, so the port is free
		c.Close()
	}
	return "all"
}

// twoServers uses one source port for two connections at the same time, to two ports of the server.
func twoServers(ctx context.Context, to string) string {
	host, _, err := net.SplitHostPort(to)
	if err != nil {
		return word(err)
	}
	d := &net.Dialer{LocalAddr: &net.TCPAddr{Port: 26000 + os.Getpid()%5000}, Control: func(_, _ string, raw syscall.RawConn) error {
		return raw.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
	}}
	other := net.JoinHostPort(host, fmt.Sprint(PortTCP))
	return with(d, func(c *net.TCPConn) string {
		return with(d, func(second *net.TCPConn) string {
			return sends(second, 10) + receives(second) + "the first: " + sends(c, 10) + shut(c) + receives(c)
		})(ctx, to)
	})(ctx, other)
}

// short makes thousands of connections of one small exchange each.
func short(ctx context.Context, to string) string {
	const workers, each = 16, 250
	var mu sync.Mutex
	var all sync.WaitGroup
	counts := map[string]int{}
	for range workers {
		all.Go(func() {
			for range each {
				said := once(func(c *net.TCPConn) string { return sends(c, 10) + receives(c) })(ctx, to)
				mu.Lock()
				counts[said]++
				mu.Unlock()
			}
		})
	}
	all.Wait()
	var words []string
	for said, n := range counts {
		words = append(words, fmt.Sprintf("%d× %s", n, said))
	}
	slices.Sort(words)
	return strings.Join(words, "; ")
}

// pattern is what is sent, again and again. Its length is prime, so that a piece that is lost or doubled shows.
func pattern() []byte {
	b := make([]byte, 262139)
	r := rand.NewChaCha8([32]byte{})
	r.Read(b)
	return b
}

// sends writes n bytes, and tells how that went.
func sends(c *net.TCPConn, n int) string {
	piece := pattern()
	for left := n; left > 0; {
		part := piece[:min(left, len(piece))]
		if _, err := c.Write(part); err != nil {
			return "send: " + word(err) + ", "
		}
		left -= len(part)
	}
	return fmt.Sprintf("sent %d, ", n)
}

// takes reads exactly n bytes.
func takes(c *net.TCPConn, n int) string {
	got, err := io.ReadFull(c, make([]byte, n))
	if err != nil {
		return fmt.Sprintf("got %d of %d: %s, ", got, n, word(err))
	}
	return fmt.Sprintf("got %d, ", got)
}

// receives reads to the end, and tells how much came, its checksum, and how it ended.
func receives(c *net.TCPConn) string {
	sum := crc32.New(crc32.MakeTable(crc32.Castagnoli))
	n, err := io.CopyBuffer(struct{ io.Writer }{sum}, struct{ io.Reader }{c}, make([]byte, 256<<10))
	return fmt.Sprintf("got %d (%08x) to %s, ", n, sum.Sum32(), word(err))
}

// shut ends this side's direction.
func shut(c *net.TCPConn) string {
	if err := c.CloseWrite(); err != nil {
		return "half close: " + word(err) + ", "
	}
	return "half closed, "
}

// word names an error without what differs from connection to connection.
func word(err error) string {
	var errno syscall.Errno
	var timeout net.Error
	switch {
	case err == nil:
		return "end"
	case errors.As(err, &errno):
		return unix.ErrnoName(errno)
	case errors.As(err, &timeout) && timeout.Timeout():
		return "timeout"
	}
	return err.Error()
}

// listenConversations listens for all conversations that have a server.
func listenConversations() (map[string]chan string, error) {
	said := map[string]chan string{}
	for i, v := range conversations() {
		if v.server == nil {
			continue
		}
		said[v.name] = make(chan string, 1)
		l, err := net.Listen("tcp", fmt.Sprintf(":%d", portConversations+i))
		if err != nil {
			return nil, err
		}
		go v.serve(l.(*net.TCPListener), said[v.name])
	}
	return said, nil
}

func (v *conversation) serve(l *net.TCPListener, said chan<- string) {
	for {
		c, err := l.AcceptTCP()
		if err != nil {
			fmt.Fprintln(os.Stderr, "accept:", err)
			return
		}
		go func() {
			words := v.server(c)
			c.Close()
			if !v.quiet {
				said <- words
			}
		}()
	}
}

// converse is a client's side of a conversation, or what the server saw of the last one.
func converse(ctx context.Context, c Call, said map[string]chan string) string {
	if c.Answered {
		select {
		case words := <-said[c.Conversation]:
			return words
		case <-ctx.Done():
			return "nothing has come to an end"
		}
	}
	for _, v := range conversations() {
		if v.name == c.Conversation {
			return v.client(ctx, c.To)
		}
	}
	return "no such conversation"
}

// Conversations names the ways of using TCP that pods' programs know.
func Conversations() []string {
	var names []string
	for _, v := range conversations() {
		names = append(names, v.name)
	}
	return names
}

// conversationPatience bounds a conversation.
const conversationPatience = 60 * time.Second

// Converse makes one pod hold a conversation with another, over IPv6 if wanted, and returns what each side saw, with the
// pods' addresses replaced by "client" and "server".
func (p *Pod) Converse(ctx context.Context, to *Pod, v6 bool, name string) (client, server string, err error) {
	ctx, cancel := context.WithTimeout(ctx, conversationPatience)
	defer cancel()
	list := conversations()
	i := slices.IndexFunc(list, func(v conversation) bool { return v.name == name })
	if i < 0 {
		return "", "", fmt.Errorf("no conversation %q", name)
	}
	port := uint16(portConversations + i)
	a, err := p.Call(ctx, Call{To: to.Addr(port, v6), Conversation: name})
	if err != nil {
		return "", "", err
	}
	var b Answer
	if !list[i].quiet {
		if b, err = to.Call(ctx, Call{Conversation: name, Answered: true}); err != nil {
			return "", "", err
		}
	}
	names := strings.NewReplacer(to.Addr(port, false), "server", to.Addr(port, true), "server",
		p.Addrs[0].String(), "client", p.Addrs[1].String(), "client")
	return names.Replace(a.Words), names.Replace(b.Words), nil
}
