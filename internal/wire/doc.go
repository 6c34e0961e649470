// Package wire (words) translates the model (internal/mesh) to and from the resources control plane and node proxies
// exchange (api/). Each noun has its file, with Encode beside Decode, so that what one end writes and the other reads
// is seen together.
//
// Decoding fails closed: a value this version does not know (an enum value, an address of a wrong length, a match that
// says nothing) is an error and never dropped, because what is dropped from a policy changes whom it lets in. The
// xDS client refuses such a resource and keeps the one before.
package wire

// Type URLs of the resources, as xDS names them.
const (
	// AddressType is a workload or a service (api/workload).
	AddressType = "type.googleapis.com/istio.workload.Address"
	// AuthorizationType is an L4 authorization policy (api/security).
	AuthorizationType = "type.googleapis.com/istio.security.Authorization"
)
