package ztunnel_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
	"github.com/fairlead-mesh/fairlead/internal/netns"
)

// resolver is a resolver of the fabric, outside the mesh.
type resolver struct {
	mu     sync.Mutex
	asked  []string // questions, with the protocol
	silent chan struct{}
}

// serveResolver answers on port 53 of an address: names that begin with "many" with more than a packet holds, with
// "spoofed" with answers that are somebody else's first, with "silent" never, with "zone" by a transfer.
func (s *shop) serveResolver(addr string) *resolver {
	s.t.Helper()
	r := &resolver{silent: make(chan struct{})}
	ready := make(chan struct{}, 2)
	s.must(netns.Do(s.fabric, func() error {
		at := net.JoinHostPort(addr, "53")
		l, err := net.Listen("tcp", at)
		if err != nil {
			return err
		}
		p, err := net.ListenPacket("udp", at)
		if err != nil {
			return err
		}
		for _, server := range []*dns.Server{{Listener: l, Net: "tcp"}, {PacketConn: p, Net: "udp"}} {
			server.Handler, server.NotifyStartedFunc = r, func() { ready <- struct{}{} }
			go server.ActivateAndServe()
			s.t.Cleanup(func() { server.Shutdown() })
		}
		return nil
	}))
	<-ready
	<-ready
	s.t.Cleanup(func() { close(r.silent) })
	return r
}

func (r *resolver) ServeDNS(w dns.ResponseWriter, request *dns.Msg) {
	question := request.Question[0]
	network := w.LocalAddr().Network()
	r.mu.Lock()
	r.asked = append(r.asked, fmt.Sprintf("%s %s %s", question.Name, dns.TypeToString[question.Qtype], network))
	r.mu.Unlock()
	reply := new(dns.Msg).SetReply(request)
	text := func(value string) *dns.TXT {
		return &dns.TXT{Hdr: dns.RR_Header{Name: question.Name, Rrtype: dns.TypeTXT, Class: dns.ClassINET}, Txt: []string{value}}
	}
	kind, _, _ := strings.Cut(strings.ToLower(question.Name), ".")
	switch kind {
	case "many":
		for i := range 100 {
			reply.Answer = append(reply.Answer, text(fmt.Sprintf("%0100d", i)))
		}
		if network == "udp" {
			reply.Truncate(dns.MinMsgSize)
		}
	case "spoofed":
		for _, change := range []func(*dns.Msg){
			func(m *dns.Msg) { m.Id++ },
			func(m *dns.Msg) { m.Question[0].Name = "other.example." },
			func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeMX },
			func(m *dns.Msg) { m.Response = false },
		} {
			other := reply.Copy()
			other.Answer = []dns.RR{text("spoofed")}
			change(other)
			w.WriteMsg(other)
		}
		reply.Answer = []dns.RR{text("right")}
	case "silent":
		<-r.silent
		return
	case "zone":
		soa := &dns.SOA{Hdr: dns.RR_Header{Name: question.Name, Rrtype: dns.TypeSOA, Class: dns.ClassINET}, Ns: "ns.", Mbox: "m."}
		transfer := make(chan *dns.Envelope, 2)
		transfer <- &dns.Envelope{RR: []dns.RR{soa, text("first")}}
		transfer <- &dns.Envelope{RR: []dns.RR{text("second"), soa}}
		close(transfer)
		new(dns.Transfer).Out(w, request, transfer)
		return
	default:
		if question.Qtype == dns.TypeA {
			reply.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: question.Name, Rrtype: dns.TypeA, Class: dns.ClassINET}, A: net.IPv4(192, 0, 2, 7)}}
		} else {
			reply.Answer = []dns.RR{text("from the resolver")}
		}
	}
	w.WriteMsg(reply)
}

// ask asks a resolver from inside a pod, on a connected socket: an answer from elsewhere would not be seen.
func (s *shop) ask(p *pod, network, resolver, name string, kind uint16, change func(*dns.Msg)) (*dns.Msg, error) {
	s.t.Helper()
	to := netip.AddrPortFrom(netip.MustParseAddr(resolver), 53)
	var conn net.Conn
	var err error
	if network == "tcp" {
		conn, err = dial(s.t.Context(), p.ns, to.String())
	} else {
		conn, err = netns.DialPacket(s.t.Context(), p.ns, 0, to)
	}
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	request := new(dns.Msg).SetQuestion(name, kind)
	if change != nil {
		change(request)
	}
	client := &dns.Client{Net: network, Timeout: 9 * time.Second, UDPSize: 4096}
	reply, _, err := client.ExchangeWithConnContext(context.Background(), request, &dns.Conn{Conn: conn, UDPSize: 4096})
	return reply, err
}

// records are the answer's, one a line, without their times to live.
func records(reply *dns.Msg) string {
	var lines []string
	for _, rr := range reply.Answer {
		lines = append(lines, strings.Join(strings.Fields(strings.TrimPrefix(rr.String(), rr.Header().Name+"\t"))[1:], " "))
	}
	return strings.Join(lines, "\n")
}

func TestDNS(t *testing.T) {
	s := newShop(t, nil)
	s.services = append(s.services, &mesh.Service{
		Namespace: "shop", Hostname: "api.example.com", Addresses: []mesh.NetworkAddress{{Address: netip.MustParseAddr("240.240.0.1")}},
	})
	wide := &mesh.Service{Namespace: "shop", Hostname: "wide.example.com"}
	for i := range 100 {
		wide.Addresses = append(wide.Addresses, mesh.NetworkAddress{Address: netip.AddrFrom4([4]byte{240, 240, 1, byte(i)})})
	}
	s.services = append(s.services, wide)
	s.push(s.workloads, s.services, nil)
	resolvers := map[string]*resolver{fabric4: s.serveResolver(fabric4), fabric6: s.serveResolver(fabric6)}
	s.eventually(func() error {
		if reply, err := s.ask(s.client, "udp", fabric4, "wide.example.com.", dns.TypeA, nil); err != nil || !reply.Authoritative {
			return fmt.Errorf("answer %v: %w", reply, err)
		}
		return nil
	}, "the mesh's services are known")

	for _, tc := range []struct {
		name, ask string
		kind      uint16
		want      string
		local     bool // answered by the mesh, not the resolver
	}{
		{"service", "web.shop.svc.cluster.local.", dns.TypeA, "IN A 10.96.0.1", true},
		{"service, IPv6", "web.shop.svc.cluster.local.", dns.TypeAAAA, "IN AAAA fd96::1", true},
		{"in capitals", "Web.Shop.svc.cluster.LOCAL.", dns.TypeA, "IN A 10.96.0.1", true},
		{"short name", "web.", dns.TypeA, "IN A 10.96.0.1", true},
		{"service entry", "api.example.com.", dns.TypeA, "IN A 240.240.0.1", true},
		{"service entry, no such family", "api.example.com.", dns.TypeAAAA, "", true},
		{"with a search domain", "api.example.com.shop.svc.cluster.local.", dns.TypeA, "IN CNAME api.example.com.\nIN A 240.240.0.1", true},
		{"unknown", "www.example.com.", dns.TypeA, "IN A 192.0.2.7", false},
		{"another type", "web.shop.svc.cluster.local.", dns.TypeTXT, `IN TXT "from the resolver"`, false},
		{"spoofed answers first", "spoofed.example.", dns.TypeTXT, `IN TXT "right"`, false},
	} {
		for address, resolver := range resolvers {
			for _, network := range []string{"udp", "tcp"} {
				if network == "tcp" && tc.ask == "spoofed.example." {
					continue // nobody can slip something into the connection
				}
				t.Run(fmt.Sprintf("%s by %s to %s", tc.name, network, address), func(t *testing.T) {
					reply, err := s.ask(s.client, network, address, tc.ask, tc.kind, nil)
					if err != nil {
						t.Fatal(err)
					}
					if diff := cmp.Diff(tc.want, records(reply)); diff != "" || reply.Rcode != dns.RcodeSuccess {
						t.Errorf("%s (-want +got):\n%s", dns.RcodeToString[reply.Rcode], diff)
					}
					if reply.Question[0].Name != tc.ask {
						t.Errorf("the question came back as %s", reply.Question[0].Name)
					}
					line := fmt.Sprintf("%s %s %s", tc.ask, dns.TypeToString[tc.kind], network)
					if reached := resolver.wasAsked(line); reached == tc.local {
						t.Errorf("the resolver was asked: %v", reached)
					}
				})
			}
		}
	}
	t.Run("truncated", func(t *testing.T) { s.truncated() })
	t.Run("zone transfer", func(t *testing.T) { s.transfer() })
	t.Run("outside the mesh", func(t *testing.T) { // the control
		reply, err := s.ask(s.far, "udp", fabric4, "api.example.com.", dns.TypeA, nil)
		if err == nil && records(reply) != "IN A 240.240.0.1" {
			t.Errorf("a pod of the mesh: %s", records(reply))
		}
		outsider := s.pod("outsider", 9)
		if reply, err := s.ask(outsider, "udp", fabric4, "api.example.com.", dns.TypeA, nil); err != nil || records(reply) != "IN A 192.0.2.7" {
			t.Errorf("%v %v", reply, err)
		}
	})
	for _, line := range []string{
		`istio_dns_requests_total{request_protocol="udp",request_query_type="aaaa",source_canonical_revision="v1",source_canonical_service="client"} 4`,
		`istio_dns_upstream_requests_total{request_protocol="tcp",request_query_type="a",source_canonical_revision="v1",source_canonical_service="client"} 2`,
		`istio_dns_upstream_request_duration_seconds_count{request_protocol="tcp",request_query_type="a",source_canonical_revision="v1",source_canonical_service="client"} 2`,
	} {
		checkMetrics(t, s.node1, line)
	}
}

func (r *resolver) wasAsked(line string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, asked := range r.asked {
		if asked == line {
			return true
		}
	}
	return false
}

// truncated: what does not fit in a packet is said to be cut, and comes whole by TCP; the mesh's own and a resolver's.
func (s *shop) truncated() {
	s.t.Helper()
	for _, tc := range []struct {
		name string
		kind uint16
	}{{"wide.example.com.", dns.TypeA}, {"many.example.", dns.TypeTXT}} {
		for network, change := range map[string]func(*dns.Msg){"udp": nil, "tcp": nil, "edns": func(m *dns.Msg) { m.SetEdns0(4096, false) }} {
			transport := strings.Replace(network, "edns", "udp", 1)
			reply, err := s.ask(s.client, transport, fabric4, tc.name, tc.kind, change)
			if err != nil {
				s.t.Errorf("%s by %s: %v", tc.name, network, err)
				continue
			}
			if whole := len(reply.Answer) == 100; whole != (network == "tcp") || reply.Truncated == whole {
				s.t.Errorf("%s by %s: %d records, truncated %v", tc.name, network, len(reply.Answer), reply.Truncated)
			}
			reply.Compress = true
			if size := reply.Len(); network == "udp" && size > dns.MinMsgSize || network == "edns" && size > 1232 {
				s.t.Errorf("%s by %s: %d bytes", tc.name, network, size)
			}
		}
	}
}

// transfer: a zone's transfer is passed on whole.
func (s *shop) transfer() {
	s.t.Helper()
	conn, err := dial(s.t.Context(), s.client.ns, net.JoinHostPort(fabric4, "53"))
	s.must(err)
	transfer := &dns.Transfer{Conn: &dns.Conn{Conn: conn}}
	envelopes, err := transfer.In(new(dns.Msg).SetAxfr("zone.example."), "")
	s.must(err)
	n := 0
	for e := range envelopes {
		s.must(e.Error)
		n += len(e.RR)
	}
	if n != 4 {
		s.t.Errorf("%d records, want 4", n)
	}
}

// TestDNSIsBounded: a resolver that does not answer, and a pod that asks too much.
func TestDNSIsBounded(t *testing.T) {
	s := newShop(t, nil)
	s.serveResolver(fabric4)
	began := time.Now()
	reply, err := s.ask(s.client, "udp", fabric4, "silent.example.", dns.TypeA, nil)
	if took := time.Since(began); err != nil || reply.Rcode != dns.RcodeServerFailure || took < 4*time.Second {
		t.Errorf("after %v: %v %v", took, reply, err)
	}
	if reply, err := s.ask(s.client, "udp", fabric6, "www.example.", dns.TypeA, nil); err != nil || reply.Rcode != dns.RcodeServerFailure {
		t.Errorf("a resolver that is not there: %v %v", reply, err)
	}
	// 128 may be under way; the others are refused at once, and so is another name, but not another pod's.
	conn, err := netns.DialPacket(t.Context(), s.client.ns, 0, netip.MustParseAddrPort(fabric4+":53"))
	s.must(err)
	defer conn.Close()
	conn.SetReadDeadline(time.Now().Add(3 * time.Second))
	refused := 0
	for i := range 160 {
		request, err := new(dns.Msg).SetQuestion(fmt.Sprintf("silent.%d.example.", i), dns.TypeA).Pack()
		s.must(err)
		_, err = conn.Write(request)
		s.must(err)
	}
	buf := make([]byte, 512)
	for {
		n, err := conn.Read(buf)
		if err != nil {
			break
		}
		var reply dns.Msg
		s.must(reply.Unpack(buf[:n]))
		if reply.Rcode == dns.RcodeServerFailure {
			refused++
		}
	}
	if refused != 32 {
		t.Errorf("%d of 160 queries were refused at once, want 32", refused)
	}
	if reply, err := s.ask(s.near, "udp", fabric4, "www.example.", dns.TypeA, nil); err != nil || reply.Rcode != dns.RcodeSuccess {
		t.Errorf("another pod: %v %v", reply, err)
	}
	s.eventually(func() error {
		if reply, err := s.ask(s.client, "udp", fabric4, "www.example.", dns.TypeA, nil); err != nil || reply.Rcode != dns.RcodeSuccess {
			return fmt.Errorf("%v %w", reply, err)
		}
		return nil
	}, "the pod can ask again")
}

// TestDNSConnectionsAreBounded: also those that wait until the mesh knows their pod. Then they have their places back.
func TestDNSConnectionsAreBounded(t *testing.T) {
	s := newShop(t, nil)
	s.serveResolver(fabric4)
	unknown := s.pod("unknown", 5)
	s.enrol(s.node1, unknown)
	over := make(chan struct{})
	var open sync.WaitGroup
	try := func() error {
		conn, err := dial(t.Context(), unknown.ns, net.JoinHostPort(fabric4, "53"))
		if err != nil {
			return err
		}
		open.Go(func() { <-over; conn.Close() })
		conn.SetDeadline(time.Now().Add(time.Second))
		_, err = conn.Read(make([]byte, 1))
		return err
	}
	rounds := 0
	s.eventually(func() error {
		var resets atomic.Int32
		var tries sync.WaitGroup
		for range 65 {
			tries.Go(func() {
				if err := try(); errors.Is(err, syscall.ECONNRESET) {
					resets.Add(1)
				} else if !errors.Is(err, os.ErrDeadlineExceeded) {
					t.Errorf("a connection that waits: %v", err)
				}
			})
		}
		tries.Wait()
		if rounds++; rounds == 1 && resets.Load() > 1 {
			t.Errorf("%d connections of 65 were reset, want 1", resets.Load())
		}
		if resets.Load() == 0 {
			return errors.New("none was reset")
		}
		return nil
	}, "one too many is reset at once")
	checkMetrics(t, s.node1, "fairlead_pod_limit_hits_total{", `limit="dns_connections"`, `pod="unknown"`)
	if reply, err := s.ask(s.client, "tcp", fabric4, "www.example.", dns.TypeA, nil); err != nil || reply.Rcode != dns.RcodeSuccess {
		t.Errorf("another pod: %v %v", reply, err)
	}
	close(over)
	open.Wait()
	s.push(append(s.workloads, unknown.workload("node1", nil)), s.services, nil)
	s.eventually(func() error {
		_, err := s.ask(unknown, "tcp", fabric4, "www.example.", dns.TypeA, nil)
		return err
	}, "the pod is known")
}

// TestDNSBehindRules: where rules rewrite the queries' address to the proxy's port, the resolvers of the proxy's own
// configuration are asked.
func TestDNSBehindRules(t *testing.T) {
	conf := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(conf, []byte("nameserver "+fabric6+"\nnameserver "+fabric4+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	s := newShop(t, map[string]string{resolvConf: conf})
	s.serveResolver(fabric4) // the first one does not answer
	ruled := s.pod("ruled", 7)
	s.push(append(s.workloads, ruled.workload("node1", nil)), s.services, nil)
	s.hand(s.node1, ruled)
	for name, want := range map[string]string{"web.": "IN A 10.96.0.1", "www.example.com.": "IN A 192.0.2.7"} {
		conn, err := netns.DialPacket(t.Context(), ruled.ns, 0, netip.MustParseAddrPort("127.0.0.1:15053"))
		s.must(err)
		defer conn.Close()
		client := &dns.Client{Timeout: 9 * time.Second}
		reply, _, err := client.ExchangeWithConn(new(dns.Msg).SetQuestion(name, dns.TypeA), &dns.Conn{Conn: conn})
		if err != nil || records(reply) != want {
			t.Errorf("%s: %v %v", name, reply, err)
		}
	}
}

// TestHostileDNS: what is no query is not answered, and harms nobody.
func TestHostileDNS(t *testing.T) {
	s := newShop(t, nil)
	s.serveResolver(fabric4)
	answer, err := new(dns.Msg).SetReply(new(dns.Msg).SetQuestion("www.example.", dns.TypeA)).Pack()
	s.must(err)
	loop := append(make([]byte, 12), 0xc0, 12, 0, 1, 0, 1) // a name that points at itself
	loop[5] = 1
	for name, message := range map[string][]byte{"empty": {}, "short": {1, 2, 3}, "an answer": answer, "a loop": loop, "large": make([]byte, 6000)} {
		conn, err := netns.DialPacket(t.Context(), s.client.ns, 0, netip.MustParseAddrPort(fabric4+":53"))
		s.must(err)
		defer conn.Close()
		_, err = conn.Write(message)
		s.must(err)
		stream, err := dial(t.Context(), s.client.ns, fabric4+":53")
		s.must(err)
		defer stream.Close()
		_, err = stream.Write(append([]byte{byte(len(message) >> 8), byte(len(message))}, message...))
		s.must(err)
		reply, err := s.ask(s.client, "udp", fabric4, "www.example.", dns.TypeA, nil)
		if err != nil || reply.Rcode != dns.RcodeSuccess {
			t.Errorf("after %s: %v %v", name, reply, err)
		}
	}
}
