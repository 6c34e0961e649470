package ztunnel

// A name that an application of this node asks for, in steps:
//  1. The query is received in the pod's network namespace, by UDP (dns_udp.go) or TCP (dns_tcp.go); the resolver that it
//     was sent to is known.
//  2. What the mesh knows at this moment is taken, and internal/route/dns.go looks the name up in it.
//  3. A service of the mesh is answered for here. Everything else goes, as it is, to the resolver that was asked
//     (dns_upstream.go), and so does its answer.
//  4. The answer comes from the address that was asked.
// Next: internal/route/dns.go

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"
	"go.uber.org/zap"

	"github.com/fairlead-mesh/fairlead/internal/route"
)

const (
	dnsPort = 53
	// dnsTTL is how many seconds an answer of the mesh may be kept.
	dnsTTL = 30
	// dnsTimeout bounds the wait for a resolver. It is what resolvers' clients wait for by default, before they ask again.
	dnsTimeout = 5 * time.Second
	// podQueries and nodeQueries are how many queries may be under way, of one pod and of all.
	podQueries, nodeQueries = 128, 4096
	// podDNSConnections is how many TCP connections a pod may keep open to its resolvers.
	podDNSConnections = 64
	// dnsHeader is the size of a message without any content (RFC 1035, section 4.1.1).
	dnsHeader = 12
	// maxDNSAnswer bounds an answer of the mesh by UDP, whatever the client says that it takes: one that has to be cut into
	// fragments is easily lost.
	maxDNSAnswer = 1232
)

var errTooManyQueries = errors.New("too many queries are under way")

// resolver answers the names that pods ask for.
type resolver struct {
	proxy   *Proxy
	metrics *dnsMetrics
	// upstreams are for queries whose own resolver is not known.
	upstreams []netip.AddrPort
	underWay  chan struct{}
	packets   sync.Pool // of *[dns.MaxMsgSize]byte
}

func newResolver(p *Proxy) *resolver {
	r := &resolver{proxy: p, metrics: newDNSMetrics(p.registry), underWay: make(chan struct{}, nodeQueries)}
	r.packets.New = func() any { return new([dns.MaxMsgSize]byte) }
	config, err := dns.ClientConfigFromFile(p.cfg.ResolvConf)
	if err != nil {
		p.log.Warn("no resolver of this process's own", zap.Error(err))
		return r
	}
	for _, text := range config.Servers {
		if ip, err := netip.ParseAddr(text); err == nil {
			r.upstreams = append(r.upstreams, netip.AddrPortFrom(ip.Unmap(), dnsPort))
		}
	}
	return r
}

// query is one message of a client.
type query struct {
	message []byte
	opcode  int
	// name is in lower case, without a dot at its end. It and what follows are those of the only question; plain is false
	// where there is not exactly one.
	name        string
	kind, class uint16
	plain       bool
}

// parseQuery reads what is needed of a message; it is false for one that nobody needs to answer.
func parseQuery(message []byte) (query, bool) {
	q := query{message: message}
	if len(message) < dnsHeader || message[2]&0x80 != 0 {
		return q, false // no message, or an answer
	}
	q.opcode = int(message[2] >> 3 & 0xf)
	if binary.BigEndian.Uint16(message[4:]) != 1 {
		return q, true
	}
	name, end, err := dns.UnpackDomainName(message, dnsHeader)
	if err != nil || end+4 > len(message) {
		return q, true
	}
	q.name = strings.ToLower(strings.TrimSuffix(name, "."))
	q.kind, q.class = binary.BigEndian.Uint16(message[end:]), binary.BigEndian.Uint16(message[end+2:])
	q.plain = true
	return q, true
}

// asksForAddress tells whether the mesh may know the answer.
func (q query) asksForAddress() bool {
	return q.plain && q.opcode == dns.OpcodeQuery && q.class == dns.ClassINET && (q.kind == dns.TypeA || q.kind == dns.TypeAAAA)
}

// begin reserves room for one more query of a pod; it is false when there is none. end gives it back.
func (r *resolver) begin(p *pod) bool {
	select {
	case p.queries <- struct{}{}:
	default:
		return false
	}
	select {
	case r.underWay <- struct{}{}:
		return true
	default:
		<-p.queries
		return false
	}
}

func (r *resolver) end(p *pod) {
	<-p.queries
	<-r.underWay
}

// forwarder asks a resolver.
type forwarder func(ctx context.Context, q query) ([]byte, error)

// answer is the message to answer a query with.
func (r *resolver) answer(ctx context.Context, p *pod, q query, protocol string, forward forwarder) []byte {
	if !r.begin(p) {
		return r.refuse(p, q, protocol, errTooManyQueries)
	}
	defer r.end(p)
	snap, self, failed := r.proxy.view(ctx, p)
	if failed != nil {
		return r.refuse(p, q, protocol, failed)
	}
	counters := r.metrics.of(q, protocol, self)
	counters.requests.Inc()
	if q.asksForAddress() {
		found := route.Resolve(snap, self, r.proxy.cfg.ClusterDomain, q.name, q.kind == dns.TypeAAAA)
		if found.Service != nil {
			if message, err := q.reply(found, protocol == protocolTCP); err == nil {
				return message
			}
		}
	}
	counters.upstreamRequests.Inc()
	began := time.Now()
	message, err := forward(ctx, q)
	counters.upstreamDuration.Observe(time.Since(began).Seconds())
	if err != nil {
		counters.upstreamFailures.Inc()
		r.explain(p, q, err)
		return q.failure()
	}
	return message
}

// refuse answers a query that was not looked at.
func (r *resolver) refuse(p *pod, q query, protocol string, why error) []byte {
	r.metrics.of(q, protocol, nil).requests.Inc()
	r.explain(p, q, why)
	return q.failure()
}

func (r *resolver) explain(p *pod, q query, why error) {
	r.proxy.log.Debug("DNS query failed", zap.String("pod", p.Namespace+"/"+p.Name), zap.String("name", q.name),
		zap.String("type", typeName(q.kind)), zap.Error(why))
}

// reply answers with what the mesh knows.
func (q query) reply(found route.Resolution, tcp bool) ([]byte, error) {
	var request, reply dns.Msg
	if err := request.Unpack(q.message); err != nil {
		return nil, fmt.Errorf("read DNS query: %w", err)
	}
	reply.SetReply(&request)
	reply.Authoritative, reply.RecursionAvailable, reply.Compress = true, true, true
	limit := dns.MinMsgSize
	if opt := request.IsEdns0(); opt != nil {
		limit = max(limit, min(int(opt.UDPSize()), maxDNSAnswer))
		reply.SetEdns0(maxDNSAnswer, opt.Do())
	}
	if tcp {
		limit = dns.MaxMsgSize
	}
	owner := request.Question[0].Name
	if found.Alias != "" && len(found.Addresses) > 0 {
		alias := dns.Fqdn(found.Alias)
		reply.Answer = append(reply.Answer, &dns.CNAME{Hdr: recordHeader(owner, dns.TypeCNAME), Target: alias})
		owner = alias
	}
	for _, i := range rand.Perm(len(found.Addresses)) {
		if a := found.Addresses[i]; a.Is4() {
			reply.Answer = append(reply.Answer, &dns.A{Hdr: recordHeader(owner, dns.TypeA), A: a.AsSlice()})
		} else {
			reply.Answer = append(reply.Answer, &dns.AAAA{Hdr: recordHeader(owner, dns.TypeAAAA), AAAA: a.AsSlice()})
		}
	}
	reply.Truncate(limit)
	return reply.Pack()
}

func recordHeader(name string, kind uint16) dns.RR_Header {
	return dns.RR_Header{Name: name, Rrtype: kind, Class: dns.ClassINET, Ttl: dnsTTL}
}

// failure is the answer SERVFAIL, by which a client asks its next resolver. It repeats no more of the query than its
// header, which is all of it that is known to be sound.
func (q query) failure() []byte {
	message := append([]byte(nil), q.message[:dnsHeader]...)
	message[2] = message[2]&0x79 | 0x80              // an answer, with opcode and recursion desired as they were
	message[3] = 0x80 | byte(dns.RcodeServerFailure) // recursion available
	clear(message[4:])
	if !q.plain {
		return message
	}
	name, end, err := dns.UnpackDomainName(q.message, dnsHeader)
	if err != nil || name == "" {
		return message
	}
	message[5] = 1
	return append(message, q.message[dnsHeader:end+4]...)
}

// isAnswer tells whether a message answers the query: one that somebody else has slipped in rarely does.
func (q query) isAnswer(message []byte) bool {
	if len(message) < dnsHeader || message[2]&0x80 == 0 || [2]byte(message) != [2]byte(q.message) {
		return false
	}
	if !q.plain {
		return true
	}
	if binary.BigEndian.Uint16(message[4:]) == 0 {
		return message[3]&0xf != dns.RcodeSuccess // a resolver that did not understand the question
	}
	name, end, err := dns.UnpackDomainName(message, dnsHeader)
	return err == nil && end+4 <= len(message) && strings.EqualFold(strings.TrimSuffix(name, "."), q.name) &&
		binary.BigEndian.Uint16(message[end:]) == q.kind && binary.BigEndian.Uint16(message[end+2:]) == q.class
}
