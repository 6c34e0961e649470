// Package mesh (words) is the model every room shares: workloads, services, policies and identities as plain values.
// It imports the standard library only and holds no behaviour beyond naming and comparing.
package mesh
